"""A cheap check that ranks have decided alike what each of them computes by itself.

every rank: digests of what it decided ──► all-gathered ──► a line that names what differs, and where, instead of a hang

What a clock, a file or the environment decides is not computed by each: see `parallel.on_first_rank` and `scoring.score`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from npr_ext.errors import UserError

Part = NDArray[Any] | str


def agree(when: str, **decided: Iterable[Part]) -> None:
    """UserError on every rank where something that they decided differs; 8 bytes of each travel. Collective."""
    size = dist.get_world_size()
    if size == 1:
        return
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    digests = torch.tensor([_digest(parts) for parts in decided.values()], device=device)
    gathered = [torch.empty_like(digests) for _ in range(size)]
    dist.all_gather(gathered, digests)
    of_ranks = torch.stack(gathered).tolist()
    for column, name in enumerate(decided):
        odd = _odd_ranks([row[column] for row in of_ranks])
        if odd:
            ranks = f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}"
            raise UserError(
                f"{when}: the {name} of {ranks} {'are' if name.endswith('s') else 'is'} not what the other ranks have, so the"
                " run ends here: give all nodes the same files, packages and settings"
            )


def _odd_ranks(values: Sequence[int]) -> list[int]:
    """Who has not what most have; of equally many, what the first rank has."""
    ((common, _),) = Counter(values).most_common(1)
    return [rank for rank, value in enumerate(values) if value != common]


def _digest(parts: Iterable[Part]) -> int:
    """A hash of type, shape and bytes of each part, int64."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        array = (
            np.frombuffer(part.encode(), np.uint8) if isinstance(part, str) else np.ascontiguousarray(part)
        )
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
