"""Where the tests find the project's files, and the data that does not come with it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The project's top folder."""

CONFIGS = ROOT / "configs"

TESTS = ROOT / "tests"

VECTORS = TESTS / "vectors"
"""Reference vectors: what the published builders of positions and masks give."""

SHARED = Path(os.environ.get("NPR_SHARED", ROOT.parent / "shared"))
"""Folder with the published data files in `data/`, for the tests marked `shared`; they skip where it does not lie."""
