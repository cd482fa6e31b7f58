"""`npr` on every rank of a world, of which the second stands in another folder: its relative paths lead nowhere."""

import os
import sys

from megatron_npr.cli import main

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        os.chdir("/")
    sys.exit(main(sys.argv[1:]))
