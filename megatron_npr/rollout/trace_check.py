"""`npr trace`: do the rollouts of a run prove that branches ran at the same time? And a picture of the first ones.

run folder or file ──► rollouts ──► examine (order of fork and join, siblings side by side) ──► Verdict
                                └─► Chrome trace of the first ones
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_npr.rollout.rollout_file import read_with_pieces
from megatron_npr.runtime.latest import latest
from npr_engine.trace import examine, write_chrome_trace
from npr_ext.errors import UserError

SHOWN_FAULTS = 10
PLACES = ("rollouts.jsonl", "measured/npr.jsonl")
"""Where `npr eval` and `npr demo` leave rollouts in a run's folder."""


@dataclass(frozen=True)
class Verdict:
    """What the traces of a run show, means over its rollouts; `faults` name the rollout and what is broken.

    Attributes:
        concurrency: sampled tokens per decode step of a rollout.
        critical_path: sampled tokens on a rollout's longest path, mean; the steps that an ideal engine takes.
        real_steps: engine steps between a rollout's first and last sampled token, mean.
        parallel_efficiency: critical_path / real_steps.
    """

    source: Path
    target: Path
    num_rollouts: int
    num_parallel: int
    concurrency: float
    critical_path: float
    real_steps: float
    parallel_efficiency: float
    faults: tuple[str, ...]

    def record(self) -> dict[str, object]:
        """As JSON data."""
        return {**asdict(self), "source": str(self.source), "target": str(self.target)}

    def __str__(self) -> str:
        lines = [
            f"{self.num_rollouts} rollouts, {self.num_parallel} with a block whose branches decoded in the same steps",
            f"concurrency {self.concurrency:.2f} sampled tokens per decode step of a rollout",
            f"critical path {self.critical_path:.1f} tokens, {self.real_steps:.1f} steps taken: "
            f"parallel efficiency {self.parallel_efficiency:.3f}",
            f"{len(self.faults)} violations of fork and join order or of siblings at once",
            *self.faults[:SHOWN_FAULTS],
            f"trace: {self.target}",
        ]
        return "\n".join(lines)


def rollouts_of(run: Path) -> Path:
    """The rollouts of a run's folder, or the file itself; UserError names where they were looked for."""
    if not run.is_dir():
        return run
    last = latest(run)  # of a demo's folder
    places = [folder / place for folder in (run, last) if folder is not None for place in PLACES]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UserError(f"{run} has no rollouts ({', '.join(PLACES)}): `npr eval` and `npr demo` write them")
    return found


def check_and_write(run: Path, target: Path, *, limit: int) -> Verdict:
    """Examine every rollout of `run`; draw the first `limit` into `target` (Chrome trace format)."""
    source = rollouts_of(run)
    read = read_with_pieces(source)
    if not read:
        raise UserError(f"{source} is empty: there is nothing to check")
    executions = [(rollout.request_id, examine(rollout)) for rollout, _ in read]
    texts = {
        int(token): piece
        for rollout, pieces in read[:limit]
        for token, piece in zip(rollout.token_ids.tolist(), pieces, strict=True)
    }
    write_chrome_trace(target, [rollout for rollout, _ in read[:limit]], texts.__getitem__)
    sampled, ideal, steps = (
        sum(column)
        for column in zip(*((found.sampled, found.ideal_steps, found.real_steps) for _, found in executions))
    )
    return Verdict(
        source=source,
        target=target,
        num_rollouts=len(read),
        num_parallel=sum(not found.faults and found.parallel_blocks > 0 for _, found in executions),
        concurrency=sampled / max(steps, 1),
        critical_path=ideal / len(read),
        real_steps=steps / len(read),
        parallel_efficiency=ideal / max(steps, 1),
        faults=tuple(f"{name}: {fault}" for name, execution in executions for fault in execution.faults),
    )
