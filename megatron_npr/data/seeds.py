"""Seeds from identity: a rerun of one sample is exact, whatever else ran beside it."""

from __future__ import annotations

import hashlib


def derive_seed(*identity: int | str) -> int:
    """A 63-bit seed from what a random choice is for, e.g. (run seed, stage, pass, row, try, sample)."""
    text = "\x1f".join(str(part) for part in identity)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
