"""RoPE as config.json describes it, in every spelling that transformers reads.

rope_scaling, else rope_parameters, with rope_theta inside or beside ──► (theta, RopeScaling)

What is not one of RopeScaling's kinds, or is written so that readers disagree, is refused: it would move every position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from npr_engine.model.architecture import RopeScaling
from npr_ext.errors import UserError

DEFAULT_THETA = 10_000.0
_ANY_KIND = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KINDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def read_rope(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """The base of RoPE's wave lengths and how they are stretched; UserError names `where` and the key."""
    settings = _Settings(_chosen(config, where), config, where)
    theta = settings.number("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    if theta <= 1:
        raise UserError(f"{where}: rope_theta is {theta}, expected a number above 1")
    _check_same_theta(config, theta, where)
    kind = settings.kind
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind, settings.number("factor"))
    positions = settings.original_positions()
    if kind == "llama3":
        slow, fast = settings.number("low_freq_factor"), settings.number("high_freq_factor")
        if fast <= slow:
            raise UserError(f"{where}: high_freq_factor {fast} has to be above low_freq_factor {slow}")
        return theta, RopeScaling(kind, settings.number("factor"), positions, slow, fast)
    factor = settings.number("factor", config.get("max_position_embeddings", 0) / positions)
    return theta, RopeScaling(
        kind,
        factor,
        positions,
        slow=settings.number("beta_slow", 1.0),
        fast=settings.number("beta_fast", 32.0),
        truncate=settings.values.get("truncate", True) is not False,
        attention_factor=settings.number("attention_factor", settings.yarn_attention(factor)),
    )


def _chosen(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The table that counts: transformers takes rope_scaling whole where both are given."""
    tables = {key: config.get(key) or {} for key in ("rope_scaling", "rope_parameters")}
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{where}: {key} is {table!r}, expected a table")
    return dict(tables["rope_scaling"] or tables["rope_parameters"])


def _check_same_theta(config: Mapping[str, Any], theta: float, where: str) -> None:
    """rope_scaling that was added beside rope_parameters takes the rope_theta of the latter away unseen."""
    inside = (config.get("rope_parameters") or {}).get("rope_theta", theta)
    if inside != theta:
        raise UserError(
            f"{where}: rope_scaling replaces rope_parameters, and rope_theta would be {theta:g} instead of {inside:g}: move "
            "the keys of rope_scaling into rope_parameters"
        )


class _Settings:
    """One table of RoPE's settings, checked for its kind. Keys that are null count as not given."""

    def __init__(self, table: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
        self._config, self._where = config, where
        self.values = {key: value for key, value in table.items() if value is not None or key == "rope_theta"}
        self.kind = self.values.get("rope_type", self.values.get("type", "default"))
        layered = [key for key, value in self.values.items() if isinstance(value, dict)]
        if layered:
            raise UserError(f"{where}: RoPE of its own for some layers ({layered[0]!r}) is not supported")
        if self.kind not in _KINDS:
            raise UserError(
                f"{where}: rope_type {self.kind!r} is not supported, only {', '.join(map(repr, _KINDS))}"
            )
        strange = sorted(set(self.values) - _KINDS[self.kind] - _ANY_KIND)
        if strange:
            raise UserError(
                f"{where}: {strange[0]!r} is no setting of rope_type {self.kind!r}: remove one of them"
            )
        partial = self.values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise UserError(f"{where}: partial_rotary_factor {partial!r} is not supported, only 1.0")

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; UserError where it is none, or is missing without a default."""
        value = self.values.get(key, default)
        if value is None and key not in self.values:
            raise UserError(f"{self._where}: rope_type {self.kind!r} needs {key!r}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{self._where}: {key} is {value!r}, expected a positive number")
        return float(value)

    def original_positions(self) -> int:
        """The context that the model was first trained for. transformers prefers the key beside the table."""
        key = "original_max_position_embeddings"
        found = self._config.get(key, self.values.get(key, self._config.get("max_position_embeddings")))
        if type(found) is not int or found < 1:
            raise UserError(f"{self._where}: {key} is {found!r}, expected a positive number of tokens")
        return found

    def yarn_attention(self, factor: float) -> float:
        """What queries and keys grow by where the file does not say (Peng et al. 2023, equation 22)."""

        def growth(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        of_all, of_rotated = self.values.get("mscale_all_dim"), self.values.get("mscale")
        if of_all and of_rotated:
            return growth(self.number("mscale")) / growth(self.number("mscale_all_dim"))
        return growth(1.0)
