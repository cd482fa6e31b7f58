"""What every table of a configuration is: its base, and the kinds of numbers in it with what torch and a machine can hold."""

import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

INT64_END = 1 << 63
"""TOML's integers, torch's sizes and seeds end before it."""
PositiveInt = Annotated[int, Field(ge=1, lt=INT64_END)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=INT64_END)]
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
"""Weights, moments and logits are computed with numbers up to this one."""
PositiveFloat = Annotated[float, Field(gt=0, le=FLOAT32_MAX)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=FLOAT32_MAX)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]

MOST_THREADS = 1024
"""CPU threads of one process: OpenMP ends a process that cannot have its threads, without a word of ours."""

MOST_RESPONSES = 1 << 22
"""Most responses of one round; every one takes memory on every rank."""

NO_TEXT = {"Cc": "a control character", "Cs": "no UTF-8", "Zl": "a line break", "Zp": "a line break"}
"""Unicode categories that no name of a file or model has, and that would tear a line of a message or file apart."""


class Section(BaseModel):
    """Base of all tables: immutable, numbers finite, texts of one line; a key that is not in the schema is an error.

    What begins with ~/ lies in the user's home: a shell replaces that in a word of the command line, but in no file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    taken_from: ClassVar[Mapping[str, str]] = {}
    """Keys of a whole configuration's tables that it does not take -> the key that says it instead."""

    @field_validator("*")
    @classmethod
    def _texts_are_one_line(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            for position, letter in enumerate(str(value)):
                what = NO_TEXT.get(unicodedata.category(letter))
                if what:
                    raise ValueError(f"character {position + 1}, {letter!r}, is {what}: leave it out")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _paths_are_not_empty_and_know_the_home(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("it is empty: give a value, or leave the key out")
        if isinstance(value, str | Path) and str(value).startswith("~/"):
            return os.path.expanduser(value)
        return value
