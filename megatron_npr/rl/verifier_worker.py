"""Compares answers with math-verify: `[answer, gold]` a line in, `true` or `false` a line out."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from math_verify import parse, verify

OOM_SCORE = Path("/proc/self/oom_score_adj")


def equal(answer: str, gold: str) -> bool:
    """math-verify's verdict on two LaTeX expressions; order within a tuple counts.

    Without its own time limits, which would make "wrong" of what was never decided: whoever asks has one.
    """
    expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    given = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return bool(verify(expected, given, timeout_seconds=None))


def main() -> None:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    if OOM_SCORE.exists():  # where memory runs out, this process goes before the one that trains
        OOM_SCORE.write_text("1000")
    # Lines of the protocol are ours alone: what a library prints goes to the other stream.
    verdicts = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # The first comparison loads a parser and algebra; no answer's time shall pay for that.
    equal("x^2+2x+1", "(x+1)^2")
    print("ready", file=verdicts, flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        print(json.dumps(equal(answer, gold)), file=verdicts, flush=True)


if __name__ == "__main__":
    main()
