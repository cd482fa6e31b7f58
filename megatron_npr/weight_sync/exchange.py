"""Carries a plan out: flat buckets through all-to-all, into staging, and into the engine only when everything is sound.

    trainer shards ──pack──► bucket ──all_to_all──► staging ──checksums and version agree on ALL ranks──► engine shards

Whatever fails before the agreement (a peer that dies, a damaged bucket, ranks at different versions) leaves the engine's
weights and version as they were. The price is memory: what a rank receives is held once more until the update ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_npr.weight_sync.plan import Plan, Routes
from megatron_npr.weight_sync.schedule import Bucket, num_rows, projections, schedule
from npr_engine.model.fp8 import FP8, Fp8Weight
from npr_ext.ops.fp8 import quantize, row_amax, scale_of

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
    """The engine's weights on this rank: the trainer's own tensors where no rank of the world has to move any (and `in_place`
    allows it), buffers of its own otherwise: `tensors`, and with `fp8` the projections in `fp8`.

    `sources` are this rank's trainer shards by global name, contiguous and of one number format; they are read again at
    every update. What an engine in FP8 gets is bit for bit what it makes of its whole shard itself. Collective: every rank
    of `group` (the whole training world) makes one and updates it alike.
    """

    def __init__(
        self,
        planned: Plan,
        sources: Mapping[str, Tensor],
        group: dist.ProcessGroup | None = None,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        fp8: bool = False,
        in_place: bool = True,
    ) -> None:
        self._plan, self._sources, self._group = planned, sources, group
        world = dist.get_world_size(group)
        assert world == planned.trainer.world_size, (world, planned.trainer.world_size)
        example = next(iter(sources.values()))
        self._dtype, self._device, self._size = example.dtype, example.device, example.element_size()
        self._schedule = schedule(
            planned, dist.get_rank(group), bucket_bytes, self._size, fp8=fp8, in_place=in_place
        )
        self.version = -1  # nothing yet
        self.tensors: dict[str, Tensor] = {}
        self.fp8: dict[str, Fp8Weight] = {}
        quantized = fp8 & projections(planned)
        for tensor in self._schedule.held:
            name, shape = planned.names[tensor], planned.shapes[tensor]
            if self._schedule.in_place:
                self.tensors[name] = sources[name].view(shape)
            elif quantized[tensor]:
                self.fp8[name] = Fp8Weight.empty(shape[0], shape[1], self._device)
            else:
                self.tensors[name] = torch.zeros(shape, dtype=self._dtype, device=self._device)

    def update(self, version: int) -> Exchanged:
        """Bring the engine to the trainer's weights, as `version`; WeightUpdateError where it is refused."""
        if version <= self.version:
            raise WeightUpdateError(
                f"weights of version {version} are stale: the engine has version {self.version}"
            )
        self._agree_on(version)
        flows = Flows(self._device, self._group)
        try:
            staged = [self._exchange(bucket, flows) for bucket in self._schedule.buckets]
            damaged = flows.damaged()
        except RuntimeError as error:
            raise WeightUpdateError(
                f"update {version} broke off, version {self.version} stays: {error}"
            ) from None
        if damaged:
            raise WeightUpdateError(
                f"update {version}: {damaged} buckets arrived damaged; version {self.version} stays"
            )
        for bucket, arrived in zip(self._schedule.buckets, staged, strict=True):
            self._commit(bucket, arrived)
        self.version = version
        return Exchanged(
            version=version,
            sent=flows.sent,
            received=flows.received,
            copied=sum(self._bytes_copied(bucket) for bucket in self._schedule.buckets),
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

    def _exchange(self, bucket: Bucket, flows: Flows) -> Staged:
        scales, own_scales = self._agree_on_scales(bucket, flows) if bucket.fp8 else (None, {})
        outgoing = self._pack(bucket, scales)
        return Staged(flows.exchange(outgoing, bucket.send_counts, bucket.receive_counts), own_scales)

    def _agree_on_scales(self, bucket: Bucket, flows: Flows) -> tuple[Tensor, dict[int, Tensor]]:
        """(scales of the rows of all sends, one after the other; those of this rank's tensors of the engine).

        A row that arrives in pieces from several ranks has one scale, by the largest magnitude in any of them: senders tell
        theirs, the destination answers.
        """
        amax = [row_amax(self._rows(block, self._source(block))) for block in bucket.sends]
        incoming = flows.exchange(self._joined(amax), bucket.send_rows, bucket.receive_rows)
        own_amax: dict[int, Tensor] = {}
        for block, found in self._by_block(bucket.receives, incoming):
            part = self._own_rows(own_amax, block)
            part.copy_(torch.maximum(part, found))
        for block in bucket.copies:
            part = self._own_rows(own_amax, block)
            part.copy_(torch.maximum(part, row_amax(self._rows(block, self._source(block)))))
        scales = {tensor: scale_of(amax_R, FP8) for tensor, amax_R in own_amax.items()}
        answers = [self._own_rows(scales, block) for block in bucket.receives]
        return flows.exchange(self._joined(answers), bucket.receive_rows, bucket.send_rows), scales

    def _pack(self, bucket: Bucket, scales: Tensor | None) -> Tensor:
        dtype = self._dtype if scales is None else FP8
        outgoing = torch.empty(int(bucket.send_counts.sum()), dtype=dtype, device=self._device)
        at = row = 0
        for block in bucket.sends:
            piece = self._source(block)
            if scales is not None:
                rows = self._rows(block, piece)
                piece = quantize(rows, scales[row : row + len(rows)], FP8)
                row += len(rows)
            outgoing[at : at + piece.numel()].view(piece.shape).copy_(piece)
            at += piece.numel()
        return outgoing

    def _commit(self, bucket: Bucket, staged: Staged) -> None:
        at = 0
        for block in bucket.receives:
            target = self._target(block)
            target.copy_(staged.values[at : at + target.numel()].view(target.shape))
            at += target.numel()
        for block in bucket.copies:
            source, target = self._source(block), self._target(block)
            if bucket.fp8:
                source = quantize(self._rows(block, source), self._own_rows(staged.scales, block), FP8)
            target.copy_(source.reshape(target.shape))
        for tensor, scales_R in staged.scales.items():
            self.fp8[self._plan.names[tensor]].scales_D.copy_(scales_R)

    def _source(self, block: np.void) -> Tensor:
        return _view(self._sources[self._plan.names[block["tensor"]]], block, "source")

    def _target(self, block: np.void) -> Tensor:
        name = self._plan.names[block["tensor"]]
        return _view(
            self.fp8[name].values_DC if name in self.fp8 else self.tensors[name], block, "destination"
        )

    def _rows(self, block: np.void, piece: Tensor) -> Tensor:
        """A block by the rows of the destination's matrix, whole ones or pieces of them."""
        columns = self._plan.shapes[block["tensor"]][1]
        return piece if piece.shape[1] <= columns else piece.reshape(-1, columns)

    def _own_rows(self, figures: dict[int, Tensor], block: np.void) -> Tensor:
        """The part of a block in a figure for each row of a tensor of this rank's engine; zeros to begin with."""
        tensor = int(block["tensor"])
        rows, columns = self._plan.shapes[tensor]
        if tensor not in figures:
            figures[tensor] = torch.zeros(rows, device=self._device)
        first = int(block["destination_offset"]) // columns
        count = int(block["rows"]) * -(-int(block["row_length"]) // columns)
        return figures[tensor][first : first + count]

    def _by_block(self, blocks: Routes, figures: Tensor) -> Iterator[tuple[np.void, Tensor]]:
        counts = num_rows(self._plan, blocks).tolist()
        return zip(blocks, figures.split(counts), strict=True)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([torch.empty(0, device=self._device), *parts])

    def _bytes_copied(self, bucket: Bucket) -> int:
        elements = int((bucket.copies["rows"] * bucket.copies["row_length"]).sum())
        return elements * (1 if bucket.fp8 else self._size)


@dataclass(frozen=True)
class Staged:
    """What arrived of a bucket, flat, and in FP8 the scales of the rows of each tensor."""

    values: Tensor
    scales: dict[int, Tensor]


class Flows:
    """The all-to-alls of one update: bytes, and checksums of what was sent and what arrived."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self._device, self._group = device, group
        self._sums_sent: list[list[int]] = []  # [flows][world]
        self._sums_received: list[list[int]] = []
        self.sent = self.received = 0

    def exchange(self, outgoing: Tensor, send: NDArray[np.int64], receive: NDArray[np.int64]) -> Tensor:
        """What the others sent, by rank; `send` and `receive` are elements for and from each rank."""
        incoming = torch.empty(int(receive.sum()), dtype=outgoing.dtype, device=self._device)
        # No collective knows e4m3; of its bytes there are as many.
        arriving, leaving = (
            flat.view(torch.uint8) if flat.dtype == FP8 else flat for flat in (incoming, outgoing)
        )
        self._sums_sent.append([checksum(part) for part in outgoing.split(send.tolist())])
        dist.all_to_all_single(arriving, leaving, receive.tolist(), send.tolist(), group=self._group)
        self._sums_received.append([checksum(part) for part in incoming.split(receive.tolist())])
        self.sent += outgoing.nbytes
        self.received += incoming.nbytes
        return incoming

    def damaged(self) -> int:
        """Flows, over all ranks, whose checksum at the receiver is not the sender's."""
        if not self._sums_sent:
            wrong = torch.zeros((), dtype=torch.int64, device=self._device)
        else:
            sent_sums, found = (
                torch.tensor(sums, device=self._device).T.contiguous()
                for sums in (self._sums_sent, self._sums_received)
            )
            announced = torch.empty_like(sent_sums)
            dist.all_to_all_single(announced, sent_sums, group=self._group)
            wrong = (announced != found).sum()
        dist.all_reduce(wrong, group=self._group)
        return int(wrong)


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
