"""`python -m megatron_npr` is `npr`; torchrun starts it this way."""

import sys

from megatron_npr.cli import main

if __name__ == "__main__":
    sys.exit(main())
