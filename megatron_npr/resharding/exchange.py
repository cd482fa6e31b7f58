"""Carries a plan out: flat buckets through all-to-all, into staging, and into the engine only when everything is sound.

    trainer shards ──pack──► bucket ──all_to_all──► staging ──checksums and version agree on ALL ranks──► engine shards

Whatever fails before the agreement (a peer that dies, a damaged bucket, ranks at different versions) leaves the engine's
weights and version as they were. The price is memory: what a rank receives is held once more until the update ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_npr.resharding.plan import Plan, Routes
from megatron_npr.resharding.schedule import Bucket, schedule

BUCKET_BYTES = 64 << 20
CHECKSUM_WORDS = 1 << 20


class WeightUpdateError(RuntimeError):
    """An update that was refused; the engine has its old weights."""


@dataclass(frozen=True)
class Exchanged:
    """What one update moved on this rank, in bytes."""

    version: int
    sent: int
    received: int
    copied: int
    in_place: int


class WeightExchange:
    """The engine's weights on this rank: the trainer's own tensors where no rank of the world has to move any, buffers of
    its own otherwise.

    `sources` are this rank's trainer shards by global name, contiguous and of one number format; they are read again at
    every update. Collective: every rank of `group` (the whole training world) makes one and updates it alike.
    """

    def __init__(
        self,
        planned: Plan,
        sources: Mapping[str, Tensor],
        group: dist.ProcessGroup | None = None,
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._plan, self._sources, self._group = planned, sources, group
        self._world = dist.get_world_size(group)
        assert self._world == planned.trainer.world_size, (self._world, planned.trainer.world_size)
        example = next(iter(sources.values()))
        self._dtype, self._device, self._size = example.dtype, example.device, example.element_size()
        self._schedule = schedule(planned, dist.get_rank(group), max(bucket_bytes // self._size, 1))
        self.version = -1  # nothing yet
        self.tensors: dict[str, Tensor] = {}
        for tensor in self._schedule.held:
            name, shape = planned.names[tensor], planned.shapes[tensor]
            if self._schedule.in_place:
                self.tensors[name] = sources[name].view(shape)
            else:
                self.tensors[name] = torch.zeros(shape, dtype=self._dtype, device=self._device)

    def update(self, version: int) -> Exchanged:
        """Bring the engine to the trainer's weights, as `version`; WeightUpdateError where it is refused."""
        if version <= self.version:
            raise WeightUpdateError(
                f"weights of version {version} are stale: the engine has version {self.version}"
            )
        self._agree_on(version)
        received: list[Tensor] = []
        shape = (
            2,
            len(self._schedule.buckets),
            self._world,
        )  # of what was sent to, and received from, every rank
        sums = torch.zeros(shape, dtype=torch.int64, device=self._device)
        try:
            for index, bucket in enumerate(self._schedule.buckets):
                incoming, sums[0, index], sums[1, index] = self._exchange(bucket)
                received.append(incoming)
            damaged = self._damaged(sums)
        except RuntimeError as error:
            raise WeightUpdateError(
                f"update {version} broke off, version {self.version} stays: {error}"
            ) from None
        if damaged:
            raise WeightUpdateError(
                f"update {version}: {damaged} buckets arrived damaged; version {self.version} stays"
            )
        self._commit(received)
        self.version = version
        sends = sum(int(bucket.send_counts.sum()) for bucket in self._schedule.buckets)
        copied = int((self._schedule.copies["rows"] * self._schedule.copies["row_length"]).sum())
        return Exchanged(
            version=version,
            sent=self._size * sends,
            received=self._size * sum(map(len, received)),
            copied=self._size * copied,
            in_place=self._size * self._schedule.num_elements if self._schedule.in_place else 0,
        )

    def _agree_on(self, version: int) -> None:
        """All ranks update to one version from one version, or none does."""
        asked = torch.tensor([version, self.version, -version, -self.version], device=self._device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        highest, held, lowest, held_lowest = asked.tolist()
        if (highest, held) != (-lowest, -held_lowest):
            raise WeightUpdateError(
                f"torn update: ranks bring versions {-lowest} to {highest} to engines at {-held_lowest} to {held}"
            )

    def _exchange(self, bucket: Bucket) -> tuple[Tensor, Tensor, Tensor]:
        """(what arrived, checksums [world] of what was sent, of what arrived)."""
        outgoing = self._pack(bucket.sends, int(bucket.send_counts.sum()))
        incoming = torch.empty(int(bucket.receive_counts.sum()), dtype=self._dtype, device=self._device)
        send, receive = bucket.send_counts.tolist(), bucket.receive_counts.tolist()
        sent = torch.tensor([checksum(part) for part in outgoing.split(send)])
        dist.all_to_all_single(incoming, outgoing, receive, send, group=self._group)
        return incoming, sent, torch.tensor([checksum(part) for part in incoming.split(receive)])

    def _pack(self, blocks: Routes, count: int) -> Tensor:
        outgoing = torch.empty(count, dtype=self._dtype, device=self._device)
        at = 0
        for block in blocks:
            piece = self._source(block)
            outgoing[at : at + piece.numel()].view(piece.shape).copy_(piece)
            at += piece.numel()
        return outgoing

    def _source(self, block: np.void) -> Tensor:
        return _view(self._sources[self._plan.names[block["tensor"]]], block, "source")

    def _target(self, block: np.void) -> Tensor:
        return _view(self.tensors[self._plan.names[block["tensor"]]], block, "destination")

    def _damaged(self, sums: Tensor) -> int:
        """Flows, over all ranks, whose checksum at the receiver is not the sender's."""
        announced = torch.empty_like(sums[0].T.contiguous())
        dist.all_to_all_single(announced, sums[0].T.contiguous(), group=self._group)
        wrong = (announced != sums[1].T).sum()
        dist.all_reduce(wrong, group=self._group)
        return int(wrong)

    def _commit(self, received: list[Tensor]) -> None:
        for bucket, incoming in zip(self._schedule.buckets, received, strict=True):
            at = 0
            for block in bucket.receives:
                target = self._target(block)
                target.copy_(incoming[at : at + target.numel()].view(target.shape))
                at += target.numel()
        for block in self._schedule.copies:
            self._target(block).copy_(self._source(block))


def checksum(flat: Tensor) -> int:
    """A number that changes with every single bit of a flat tensor, and with the order of its words: the sum of words
    times odd weights, modulo 2^64. The same on every device."""
    words = flat.view(torch.uint8)
    words = torch.cat([words, words.new_zeros(-len(words) % 4)]).view(torch.int32)
    total = 0
    for start in range(0, len(words), CHECKSUM_WORDS):
        part = words[start : start + CHECKSUM_WORDS].long()
        weights = 2 * (start + torch.arange(len(part), device=part.device)) + 1
        total += int((part * weights).sum())
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def _view(shard: Tensor, block: np.void, side: str) -> Tensor:
    """[rows, row_length] of a shard."""
    assert shard.is_contiguous()
    rows, length = int(block["rows"]), int(block["row_length"])
    offset, stride = int(block[f"{side}_offset"]), int(block[f"{side}_stride"])
    assert offset + (rows - 1) * stride + length <= math.prod(shard.shape), "the plan is of other shards"
    flat = shard.view(-1)
    return flat.as_strided((rows, length), (stride, 1), flat.storage_offset() + offset)
