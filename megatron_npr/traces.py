"""`npr trace`: do the rollouts of a file prove that branches ran at the same time? And a picture of the first ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_npr.rollout_file import read_with_pieces
from npr_engine.trace import examine, write_chrome_trace

SHOWN_FAULTS = 10


@dataclass(frozen=True)
class Verdict:
    """What the traces of a file show; `faults` name the rollout and what breaks the order of fork and join."""

    target: Path
    num_rollouts: int
    num_parallel: int
    tokens_per_step: float
    faults: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.num_rollouts} rollouts, {self.num_parallel} with a block whose branches decoded in the same steps",
            f"{self.tokens_per_step:.2f} sampled tokens per decode step of a rollout",
            f"{len(self.faults)} violations of fork and join order",
            *self.faults[:SHOWN_FAULTS],
            f"trace: {self.target}",
        ]
        return "\n".join(lines)


def check_and_write(source: Path, target: Path, *, limit: int) -> Verdict:
    """Examine every rollout of `source`; draw the first `limit` into `target` (Chrome trace format)."""
    read = read_with_pieces(source)
    executions = [(rollout.request_id, examine(rollout)) for rollout, _ in read]
    texts = {
        int(token): piece
        for rollout, pieces in read[:limit]
        for token, piece in zip(rollout.token_ids.tolist(), pieces, strict=True)
    }
    write_chrome_trace(target, [rollout for rollout, _ in read[:limit]], texts.__getitem__)
    steps = sum(execution.real_steps for _, execution in executions)
    return Verdict(
        target=target,
        num_rollouts=len(read),
        num_parallel=sum(not found.faults and found.parallel_blocks > 0 for _, found in executions),
        tokens_per_step=sum(execution.sampled for _, execution in executions) / max(steps, 1),
        faults=tuple(f"{name}: {fault}" for name, execution in executions for fault in execution.faults),
    )
