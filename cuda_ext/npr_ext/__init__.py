"""Branch layouts and the attention operators that read them; a C++ core with the same definition for CPU and CUDA."""

from npr_ext.errors import UserError
from npr_ext.layout import BranchLayout, LayoutViolation, branch_layout
from npr_ext.tags import TagIds
from npr_ext.violations import MESSAGES, Violation

__all__ = [
    "MESSAGES",
    "BranchLayout",
    "LayoutViolation",
    "TagIds",
    "UserError",
    "Violation",
    "branch_layout",
]
