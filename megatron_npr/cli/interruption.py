"""The command that continues an interrupted one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_npr.cli.commands import STAGES


def how_to_continue(words: Sequence[str]) -> str:
    """What to type after `npr` with these words was interrupted."""
    if words[:1] == ["demo"]:
        again = words if "--resume" in words else [*words, "--resume"]
        return f"continue with: npr {shlex.join(again)}"
    if words and words[0] in STAGES:
        return f"continue with: npr {shlex.join([*_without_start(words), '--run.resume', 'auto'])}"
    return "nothing to continue from"


def _without_start(words: Sequence[str]) -> list[str]:
    """The words but for those that say what becomes of a run that is there."""
    kept: list[str] = []
    value = False  # of an option that is left out
    for word in words:
        if word.partition("=")[0] in ("--run.resume", "--run.overwrite"):
            value = "=" not in word
        elif not value or word.startswith("--"):
            kept.append(word)
            value = False
        else:
            value = False
    return kept
