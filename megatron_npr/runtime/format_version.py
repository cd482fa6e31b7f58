"""The versions of what this program writes for a later start to read, and the one place that judges them.

A number is raised when the format changes so that the code before would misread it. What carries no version was written before
there were any (version 0): the formats of versions 0 and 1 hold the same data, so it is read as it is.
"""

from typing import Any, Final, Literal

from npr_ext.errors import UserError

Kind = Literal["run folder", "demo folder", "checkpoint", "samples file", "rollouts file", "report record"]

FORMAT_VERSION = "format_version"
"""Key under which every record carries it."""

CURRENT: Final[dict[Kind, int]] = {
    "run folder": 1,
    "demo folder": 1,
    "checkpoint": 1,
    "samples file": 1,
    "rollouts file": 1,
    "report record": 1,
}


def check_format(kind: Kind, place: object, version: Any) -> None:
    """UserError, naming `place` and both versions, unless this program reads `version` (None: it carries none)."""
    ours = CURRENT[kind]
    if version is None or (type(version) is int and 0 <= version <= ours):
        return
    raise UserError(
        f"{place} is a {kind} of format version {version!r}, this program reads versions up to {ours}: "
        "use the version of Megatron NPR that wrote it, or a newer one"
    )
