"""The configuration files that come with the project."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]

# A wheel carries the checkout's configs/ inside the package (setup.py).
CONFIGS = next(folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir())
