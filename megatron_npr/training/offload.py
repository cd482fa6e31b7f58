"""Trainer and engine share a device: each gives back, while the other works, what it does not need.

    rollout ──► optimizer state in host memory, gradient buffers freed, KV cache there
    training ─► optimizer state back, gradient buffers there, KV cache freed

Tensors keep their identity: only the memory of their storages goes and comes back, so no reference has to be renewed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_npr.config import MemorySettings
from megatron_npr.training.trainer import Trainer
from npr_engine.backend import Backend


@dataclass
class _Offloaded:
    """A storage whose memory is freed. `copy` holds its bytes in host memory, None where they need not be kept."""

    storage: torch.UntypedStorage
    num_bytes: int
    copy: Tensor | None


@dataclass
class TrainerMemory:
    """What of a trainer may leave the device during rollouts."""

    trainer: Trainer
    settings: MemorySettings
    _offloaded: list[_Offloaded] = field(default_factory=list)

    def offload(self) -> int:
        """Free what the settings name; bytes freed. The trainer must not step until `onload`."""
        assert not self._offloaded
        if self.settings.offload_optimizer:
            self._offloaded += [_to_host(storage) for storage in _storages(optimizer_tensors(self.trainer))]
            if self.trainer.world.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # copies run beside the host
        if self.settings.offload_gradients:
            # Their content is used up by the optimizer's step and zeroed before the next.
            self._offloaded += [
                _Offloaded(storage, storage.nbytes(), None)
                for storage in _storages(gradient_buffers(self.trainer))
            ]
        for one in self._offloaded:
            one.storage.resize_(0)
        return sum(one.num_bytes for one in self._offloaded)

    def onload(self) -> None:
        """Take the memory again, with the content that it had."""
        for one in self._offloaded:
            one.storage.resize_(one.num_bytes)
            target = torch.empty(0, dtype=torch.uint8, device=one.storage.device).set_(one.storage)
            if one.copy is None:
                target.zero_()
            else:
                target.copy_(one.copy, non_blocking=True)
        if self.trainer.world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the host copies are dropped
        self._offloaded.clear()


def optimizer_tensors(trainer: Trainer) -> list[Tensor]:
    """Moments of Adam and, in 16-bit training, the fp32 weights. In fp32 training those ARE the model's and stay."""
    tensors: list[Tensor] = []
    for part in trainer.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
        for group in part.shard_fp32_from_float16_groups:
            tensors += [weight.data for weight in group if weight is not None]
    return tensors


def gradient_buffers(trainer: Trainer) -> list[Tensor]:
    """Megatron's contiguous gradient buffers."""
    return [
        buffer.grad_data
        for chunk in trainer.chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]


def _storages(tensors: list[Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return [storage for address, storage in found.items() if address]


def _to_host(storage: torch.UntypedStorage) -> _Offloaded:
    source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    pinned = storage.device.type == "cuda"
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu", pin_memory=pinned)
    return _Offloaded(storage, storage.nbytes(), copy.copy_(source, non_blocking=pinned))


@contextlib.contextmanager
def rollout_memory(
    trainer_memory: TrainerMemory, engine: Backend, settings: MemorySettings
) -> Iterator[None]:
    """Within this context the engine has the device; the trainer has it again at the end, also after an error."""
    trainer_memory.offload()
    try:
        if settings.release_kv:
            engine.resume_memory()
        yield
    finally:
        if settings.release_kv:
            engine.release_memory()
        trainer_memory.onload()
