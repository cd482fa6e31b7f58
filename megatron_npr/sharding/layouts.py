"""Where ranks stand in the trainer's grid and in an engine replica.

trainer: rank = (stage, place in the stage); the place counts tp fastest, then cp, then dp. Experts count etp fastest,
then ep, over the same places (Megatron's order "tp-cp-ep-dp-pp").
engine: replica r owns ranks [r * size, (r + 1) * size); tp fastest, experts etp fastest, then ep.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_npr.sharding.architecture import Architecture
from npr_ext.errors import UserError


@dataclass(frozen=True)
class TrainerLayout:
    """Sizes of the training grid.

    Attributes:
        layers: decoder layers of each VIRTUAL stage in the order of the model, `pp * vpp` numbers; virtual stage v is
        chunk v // pp of pipeline stage v % pp.
        dp_cp: ranks that hold the same dense shard: context- times data-parallel size.
        etp: tensor-parallel size inside an expert.
    """

    layers: tuple[int, ...]
    tp: int = 1
    pp: int = 1
    dp_cp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        if len(self.layers) % self.pp:
            raise UserError(f"{len(self.layers)} virtual stages do not fit pp {self.pp}")
        if self.places % (self.ep * self.etp):
            raise UserError(
                f"ep {self.ep} x etp {self.etp} does not divide the {self.places} ranks of a pipeline stage"
            )

    @property
    def places(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp * self.dp_cp

    @property
    def world_size(self) -> int:
        return self.pp * self.places

    def stage_of_layers(self) -> list[int]:
        """The pipeline stage of every decoder layer."""
        return [virtual % self.pp for virtual, count in enumerate(self.layers) for _ in range(count)]


@dataclass(frozen=True)
class EngineLayout:
    """Sizes of one engine replica: attention over tp ranks, experts over ep x etp ranks of the same replica.

    Where those are more, the replica has several copies of attention, which decode requests of their own.
    """

    tp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        small, large = sorted((self.tp, self.ep * self.etp))
        if large % small:
            raise UserError(f"engine tp {self.tp} and ep {self.ep} x etp {self.etp} do not divide each other")

    @classmethod
    def of(cls, architecture: Architecture, tp: int, ep: int) -> EngineLayout:
        """What rollout.tp and rollout.ep mean: ep ranks hold whole experts; where they are fewer than tp, the tp / ep
        ranks that share theirs cut them. UserError where that does not fit the model."""
        if not architecture.num_experts:
            if ep > 1:
                raise UserError(
                    f"rollout.ep = {ep}: the model has no experts; leave rollout.ep and parallel.ep out"
                )
            return cls(tp)
        if ep % tp and tp % ep:
            raise UserError(f"rollout.ep = {ep} and rollout.tp = {tp}: make one a multiple of the other")
        if architecture.num_experts % ep:
            raise UserError(
                f"rollout.ep = {ep} does not divide the model's {architecture.num_experts} experts: choose a divisor"
            )
        etp = max(tp // ep, 1)
        if architecture.ffn_hidden_size % etp:
            raise UserError(
                f"rollout.ep = {ep} on rollout.tp = {tp} ranks cuts experts of {architecture.ffn_hidden_size} columns into "
                f"{etp} parts: choose rollout.ep >= rollout.tp"
            )
        return cls(tp, ep, etp)

    @property
    def size(self) -> int:
        """Ranks of a replica."""
        return max(self.tp, self.ep * self.etp)


def split_layers(
    num_layers: int, *, pp: int, vpp: int = 1, first: int | None = None, last: int | None = None
) -> tuple[int, ...]:
    """Layers of each virtual stage as Megatron splits them: `first` and `last` layers on the outer pipeline stages
    (over all their chunks), the rest evenly. UserError where it does not come out even."""
    outer = [count for count in (first, last) if count is not None]
    middle_stages, rest = pp - len(outer), num_layers - sum(outer)
    if middle_stages < 0 or rest < 0 or (middle_stages == 0 and rest):
        raise UserError(f"{num_layers} layers do not fit pp {pp} with {first} first and {last} last layers")
    for count, what in ((first, "first stage"), (last, "last stage"), (rest, "middle stages")):
        parts = vpp * (middle_stages if what == "middle stages" else 1)
        if count is not None and parts and count % parts:
            raise UserError(f"{count} layers of the {what} do not divide into {parts} equal chunks")
    middle = rest // (vpp * middle_stages) if middle_stages else 0
    chunk = [
        *([first // vpp] if first is not None else []),
        *[middle] * middle_stages,
        *([last // vpp] if last is not None else []),
    ]
    return tuple(chunk * vpp)


def check_layouts(architecture: Architecture, trainer: TrainerLayout, engine: EngineLayout) -> None:
    """UserError with one line where a size does not divide what it cuts."""
    if sum(trainer.layers) != architecture.num_layers:
        raise UserError(f"stages hold {sum(trainer.layers)} layers, the model has {architecture.num_layers}")
    if trainer.world_size % engine.size:
        raise UserError(
            f"engine replicas of {engine.size} ranks do not fill a world of {trainer.world_size} ranks"
        )
    for side, tp in (("trainer", trainer.tp), ("engine", engine.tp)):
        groups, heads = architecture.num_kv_heads, architecture.num_heads
        if heads % tp or (groups % tp and tp % groups):
            raise UserError(f"{side} tp {tp} does not fit {heads} heads and {groups} KV heads")
        if architecture.qkv_rows % tp:
            raise UserError(f"{side} tp {tp} does not divide the {architecture.qkv_rows} rows of fused QKV")
        if not architecture.num_experts and architecture.ffn_hidden_size % tp:
            raise UserError(f"{side} tp {tp} does not divide ffn_hidden_size {architecture.ffn_hidden_size}")
    for side, ep, etp in (("trainer", trainer.ep, trainer.etp), ("engine", engine.ep, engine.etp)):
        if not architecture.num_experts and ep * etp > 1:
            raise UserError(f"{side} ep {ep} x etp {etp}: the model has no experts")
        if architecture.num_experts and (architecture.num_experts % ep or architecture.ffn_hidden_size % etp):
            raise UserError(
                f"{side} ep {ep} x etp {etp} does not fit {architecture.num_experts} experts of "
                f"{architecture.ffn_hidden_size} columns"
            )
