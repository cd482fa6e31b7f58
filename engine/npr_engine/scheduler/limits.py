"""The sizes that a scheduler keeps to, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes of the engine: KV blocks and the slots of each, tokens that an engine step may compute, responses
    that may run at once."""

    num_blocks: int
    block_size: int
    max_batch_tokens: int
    max_running_requests: int


@dataclass
class Counters:
    """What has happened so far; `steps` is also the number of the engine step that comes next.

    `kv_utilisation`: KV slots with a token that some row sees / all slots, counted from the block tables when
    memory ran out for the first time; None before.
    """

    steps: int = 0
    sampled_tokens: int = 0
    computed_tokens: int = 0
    forced_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    forks: int = 0
    joins: int = 0
    peak_blocks: int = 0
    kv_utilisation: float | None = None
