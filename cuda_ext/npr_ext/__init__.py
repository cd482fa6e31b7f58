"""Branch layouts and the attention operators that read them: one definition, in C++, for CPU and CUDA.

Names are imported on first use: `npr_ext.errors` and `npr_ext.violations` come without torch, which takes a
second to load and which the command line's help and error messages do without.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npr_ext.attention import branch_attention
    from npr_ext.decoder import (
        add_rms_norm,
        categorical,
        linear,
        num_threads,
        rms_norm,
        silu_mul,
        split_heads,
    )
    from npr_ext.errors import UserError
    from npr_ext.layout import BranchLayout, LayoutViolation, branch_layout
    from npr_ext.library import cpu_isa
    from npr_ext.paged import paged_attention
    from npr_ext.tags import TagIds
    from npr_ext.violations import MESSAGES, Violation

_HOMES = {
    "MESSAGES": "violations",
    "BranchLayout": "layout",
    "LayoutViolation": "layout",
    "TagIds": "tags",
    "UserError": "errors",
    "Violation": "violations",
    "add_rms_norm": "decoder",
    "branch_attention": "attention",
    "branch_layout": "layout",
    "categorical": "decoder",
    "cpu_isa": "library",
    "linear": "decoder",
    "num_threads": "decoder",
    "paged_attention": "paged",
    "rms_norm": "decoder",
    "silu_mul": "decoder",
    "split_heads": "decoder",
}

__all__ = [
    "MESSAGES",
    "BranchLayout",
    "LayoutViolation",
    "TagIds",
    "UserError",
    "Violation",
    "add_rms_norm",
    "branch_attention",
    "branch_layout",
    "categorical",
    "cpu_isa",
    "linear",
    "num_threads",
    "paged_attention",
    "rms_norm",
    "silu_mul",
    "split_heads",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'npr_ext' has no attribute {name!r}")
    return getattr(importlib.import_module(f"npr_ext.{_HOMES[name]}"), name)
