"""What a repair of a foreign library is, and how it is applied and undone.

Repair ──────► a row of the table (README.md): what, why, since which version, until when
Replacement ─► applied(...): within the context the library's symbol is ours, after it the original object again
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from npr_ext.errors import UserError


@dataclass(frozen=True)
class Repair:
    """Something that a library does wrong, or not at all, and that we do instead.

    Attributes:
        symbol: of the library, `package.module:Object.attribute`, or the setting that is changed.
        seen_in: the version that needs it, as pyproject.toml pins it: `package==version`.
        why: what goes wrong without.
        until: what a version does that no longer needs it.
        where: our name, or file and name, that applies it, and for how long.
    """

    symbol: str
    seen_in: str
    why: str
    until: str
    where: str


@dataclass(frozen=True)
class Replacement(Repair):
    """A repair that puts another object where `symbol` is. `make`: the original -> what stands there meanwhile."""

    make: Callable[[Any], Any]

    def find(self) -> tuple[Any, str, Any]:
        """(owner, attribute, object) of the symbol now; UserError where the installed version has no such symbol."""
        module, _, path = self.symbol.partition(":")
        *outer, name = path.split(".")
        try:
            owner = importlib.import_module(module)
            for each in outer:
                owner = getattr(owner, each)
            return owner, name, vars(owner)[name]  # not getattr: what is inherited cannot be put back
        except (ImportError, AttributeError, KeyError):
            raise UserError(
                f"{self.symbol}, which megatron_npr replaces, is not in the installed version: install {self.seen_in}"
                " or look into megatron_npr/repairs/README.md whether it is still needed"
            ) from None


@contextlib.contextmanager
def applied(*replacements: Replacement) -> Iterator[None]:
    """Within this context the symbols are replaced; it may be entered again inside. After it they are what they were."""
    with contextlib.ExitStack() as undo:
        for each in replacements:
            owner, name, original = each.find()
            undo.callback(setattr, owner, name, original)
            setattr(owner, name, each.make(original))
        yield
