"""Compares answers with math-verify: `[answer, gold]` a line in, `true` or `false` a line out."""

from __future__ import annotations

import json
import logging
import sys

from math_verify import parse, verify


def equal(answer: str, gold: str) -> bool:
    """math-verify's verdict on two LaTeX expressions; order within a tuple counts."""
    return bool(verify(parse(f"\\boxed{{{gold}}}"), parse(f"\\boxed{{{answer}}}")))


def main() -> None:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # The first comparison loads a parser and algebra; no answer's time shall pay for that.
    equal("x^2+2x+1", "(x+1)^2")
    print("ready", flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        print(json.dumps(equal(answer, gold)), flush=True)


if __name__ == "__main__":
    main()
