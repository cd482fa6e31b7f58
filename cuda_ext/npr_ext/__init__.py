"""Branch layouts and the attention operators that read them: one definition, in C++, for CPU and CUDA.

Names are imported on first use: `npr_ext.errors` and `npr_ext.layout.violations` come without torch, which
takes a second to load and which the command line's help and error messages do without.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npr_ext.errors import UserError
    from npr_ext.layout.branch_layout import BranchLayout, LayoutViolation, branch_layout
    from npr_ext.layout.tags import TagIds
    from npr_ext.layout.violations import MESSAGES, Violation
    from npr_ext.library import cpu_isa
    from npr_ext.ops.attention import branch_attention
    from npr_ext.ops.decoder import (
        add_rms_norm,
        categorical,
        linear,
        num_threads,
        rms_norm,
        silu_mul,
        split_heads,
    )
    from npr_ext.ops.paged import paged_attention

_HOMES = {
    "MESSAGES": "layout.violations",
    "BranchLayout": "layout.branch_layout",
    "LayoutViolation": "layout.branch_layout",
    "TagIds": "layout.tags",
    "UserError": "errors",
    "Violation": "layout.violations",
    "add_rms_norm": "ops.decoder",
    "branch_attention": "ops.attention",
    "branch_layout": "layout.branch_layout",
    "categorical": "ops.decoder",
    "cpu_isa": "library",
    "linear": "ops.decoder",
    "num_threads": "ops.decoder",
    "paged_attention": "ops.paged",
    "rms_norm": "ops.decoder",
    "silu_mul": "ops.decoder",
    "split_heads": "ops.decoder",
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
