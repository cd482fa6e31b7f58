"""`python -m tests.fakes.te_on_cpu MODULE ARGUMENTS`: a worker's `main`, with Transformer Engine installed first."""

from __future__ import annotations

import importlib
import sys

from tests.fakes.te_on_cpu import install


def main() -> None:
    install()
    module = sys.argv.pop(1)
    importlib.import_module(module).main()


if __name__ == "__main__":
    main()
