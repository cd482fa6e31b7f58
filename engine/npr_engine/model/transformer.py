"""The inference model: a Qwen3 (dense or with experts), Qwen2.5 or Llama decoder over a paged KV cache, on
the trainer's own weight tensors.

Shapes: T tokens of a step, S sampled ones, D hidden, V vocabulary, G key/value heads of this rank, N query
heads per key/value head, H head dim, F feed-forward. Weights keep Megatron's shard layout (fused [q.. k v]
per group, fused [gate; up]) and are referenced, never copied: an optimizer step is seen by the next forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from npr_engine.model.architecture import ModelConfig as ModelConfig
from npr_engine.model.experts import ExpertRanks, Experts, FeedForward, feed_forward, mixture
from npr_engine.model.fp8 import Fp8Weight
from npr_engine.model.linear import Weight, linear
from npr_engine.model.rotary import Rotary
from npr_ext import add_rms_norm, paged_attention, rms_norm, split_heads
from npr_ext.errors import UserError
from npr_ext.ops.scaled_mm import ALIGNMENT


@dataclass(frozen=True)
class KVCache:
    """Keys (after RoPE) and values by slot, [layers, slots, G, H]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Step:
    """What a forward needs about its T tokens: see Batch. `block_tables` int32 [rows, width], the rest [T] or
    [S]. `runs` int32 [R, 2] for a GPU, see npr_ext.ops.paged."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    lengths: Tensor
    block_tables: Tensor
    sample_index: Tensor
    runs: Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer, local shards."""

    attention_norm_D: Tensor
    qkv_CD: Weight
    qkv_bias_C: Tensor | None
    query_norm_H: Tensor | None
    key_norm_H: Tensor | None
    proj_DC: Weight
    mlp_norm_D: Tensor
    feed_forward: FeedForward | Experts


class InferenceModel:
    """Runs a step of the engine: writes the KV of its tokens, gives the logits that are sampled from."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Weight],
        tp_group: ProcessGroup | None = None,
        *,
        expert_group: ProcessGroup | None = None,
        fp8: bool = False,
    ) -> None:
        """`expert_group`: the ranks of several copies of the model that share its experts, see ExpertRanks;
        None: they lie on the ranks of `tp_group`. `fp8`: those of the layers' projections that are not given
        in e4m3 are copied into it; all else are the given tensors themselves."""
        self.config = config
        self._group = tp_group
        self._tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
        self._tp_rank = 0 if tp_group is None else dist.get_rank(tp_group)
        heads, kv_heads, tp = config.num_heads, config.num_kv_heads, self._tp_size
        if heads % tp or (kv_heads % tp and tp % kv_heads):
            raise UserError(
                f"num_heads {heads} and num_kv_heads {kv_heads} cannot be split over {tp} tensor-parallel ranks"
            )
        self._num_groups = max(kv_heads // tp, 1)  # more ranks than KV heads hold copies of them
        self._expert_ranks = None if expert_group is None else ExpertRanks(config, expert_group, tp_group)
        reader = _Reader(weights)
        self._weights = reader.taken
        self._embedding_VD = reader["embedding.word_embeddings.weight"]
        self._quantized: list[tuple[Fp8Weight, Tensor]] = []  # copies, and what they are copies of
        projection = (lambda name: self._in_fp8(name, reader.weight(name))) if fp8 else reader.weight
        self._layers = [
            _layer_weights(reader, config, layer, projection) for layer in range(config.num_layers)
        ]
        self._final_norm_D = reader["decoder.final_layernorm.weight"]
        self._output_VD = self._embedding_VD if config.tied_embeddings else reader["output_layer.weight"]
        self._check_shapes()
        self._rotary = Rotary(config, self.dtype, self.device)

    def load(self, weights: Mapping[str, Weight]) -> None:
        """Copies values into the model's own tensors; UserError, and nothing changed, where a name, a shape
        or a type is not the model's."""
        for name, new in weights.items():
            if name not in self._weights:
                raise UserError(f"update_weights: the model has no weight {name!r}")
            own = self._weights[name]
            scaled, own_scaled = isinstance(new, Fp8Weight), isinstance(own, Fp8Weight)
            if (new.shape, new.dtype, scaled) != (own.shape, own.dtype, own_scaled):
                raise UserError(
                    f"update_weights: {name} is {new.dtype} {tuple(new.shape)}, the model's is {own.dtype}"
                    f" {tuple(own.shape)}"
                )
        for name, new in weights.items():
            own = self._weights[name]
            if isinstance(own, Fp8Weight):
                assert isinstance(new, Fp8Weight)
                own.copy_(new)
            elif isinstance(new, Tensor) and new.data_ptr() != own.data_ptr():
                own.copy_(new.detach())

    def refresh(self) -> None:
        """After the weights' values have changed: the copies in FP8 follow."""
        for copy, weight in self._quantized:
            copy.load(weight)

    def _in_fp8(self, name: str, weight: Weight) -> Fp8Weight:
        rows, columns = weight.shape
        if rows % ALIGNMENT or columns % ALIGNMENT:
            raise UserError(
                f"fp8: {name} is {rows} x {columns} on this rank, both must be multiples of {ALIGNMENT}: turn fp8 off"
            )
        if isinstance(weight, Fp8Weight):
            return weight
        copy = Fp8Weight.of(weight)
        self._quantized.append((copy, weight))
        return copy

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding_VD.dtype

    @property
    def device(self) -> torch.device:
        return self._embedding_VD.device

    @property
    def kv_bytes_per_slot(self) -> int:
        """Keys and values of one token in all layers, of this rank's heads."""
        return 2 * self.config.num_layers * self._num_groups * self.config.head_dim * self.dtype.itemsize

    def new_cache(self, num_slots: int) -> KVCache:
        """An empty cache for this rank's heads; what it holds at first is never read. Tokens' positions are
        below `num_slots` from then on."""
        self._rotary.need(num_slots)
        shape = (self.config.num_layers, num_slots, self._num_groups, self.config.head_dim)
        keys = torch.empty(shape, dtype=self.dtype, device=self.device)
        return KVCache(keys, torch.empty_like(keys))

    def forward(self, step: Step, cache: KVCache) -> Tensor:
        """Logits [S, V] after the tokens at `step.sample_index`; S may be 0."""
        hidden_TD = self._embed(step.token_ids)
        normed_TD = rms_norm(hidden_TD, self._layers[0].attention_norm_D, self.config.rms_norm_eps)
        sampled = step.sample_index if len(step.sample_index) < len(hidden_TD) else None
        for layer, weights in enumerate(self._layers):
            last = layer == len(self._layers) - 1
            wanted = sampled if last else None
            mixed_TD = self._attend(weights, normed_TD, step, cache.keys[layer], cache.values[layer], wanted)
            if wanted is not None:
                hidden_TD = hidden_TD.index_select(0, wanted)
            hidden_TD, normed_TD = self._add_norm(hidden_TD, mixed_TD, weights.mlp_norm_D)
            next_norm_D = self._final_norm_D if last else self._layers[layer + 1].attention_norm_D
            hidden_TD, normed_TD = self._add_norm(
                hidden_TD, self._feed_forward(weights, normed_TD), next_norm_D
            )
        return self._logits(normed_TD)

    def any_busy(self, busy: bool) -> bool:
        """Whether this model, or any that shares its experts, has something to decode. Collective where they
        are shared."""
        return busy if self._expert_ranks is None else self._expert_ranks.any_busy(busy, self.device)

    def serve_experts(self) -> None:
        """The part of an engine that has nothing to decode in a step of those that share its experts; nothing
        to do without such."""
        if self._expert_ranks is None:
            return
        nothing_TD = torch.empty(0, self.config.hidden_size, dtype=self.dtype, device=self.device)
        for weights in self._layers:
            assert isinstance(weights.feed_forward, Experts)
            self._expert_ranks.mixture(nothing_TD, weights.feed_forward)

    def _attend(
        self,
        weights: LayerWeights,
        normed_TD: Tensor,
        step: Step,
        keys_SGH: Tensor,
        values_SGH: Tensor,
        wanted: Tensor | None,
    ) -> Tensor:
        """What attention adds to the residual stream, [T, D]; of the `wanted` tokens only, where given: in
        the last layer the others leave their keys and values and are done."""
        qkv_TC = linear(normed_TD, weights.qkv_CD, weights.qkv_bias_C)
        norms, eps = (weights.query_norm_H, weights.key_norm_H), self.config.rms_norm_eps
        queries_TNH = split_heads(
            qkv_TC, *norms, *self._rotary.tables, step.positions, step.slots, keys_SGH, values_SGH, eps
        )
        rows, lengths, runs = step.rows, step.lengths, step.runs
        if wanted is not None:
            queries_TNH = queries_TNH.index_select(0, wanted)
            rows, lengths, runs = rows.index_select(0, wanted), lengths.index_select(0, wanted), None
        mixed_TNH = paged_attention(
            queries_TNH, keys_SGH, values_SGH, step.block_tables, rows, lengths, runs=runs
        )
        return self._all_reduce(linear(mixed_TNH.flatten(1), weights.proj_DC))

    def _feed_forward(self, weights: LayerWeights, normed_TD: Tensor) -> Tensor:
        """What the MLP adds to the residual stream, [T, D]."""
        if isinstance(weights.feed_forward, FeedForward):
            part_TD = feed_forward(normed_TD, weights.feed_forward)
        elif self._expert_ranks is None:
            part_TD = mixture(normed_TD, weights.feed_forward, self.config)
        else:
            part_TD = self._expert_ranks.mixture(normed_TD, weights.feed_forward)
        return self._all_reduce(part_TD)

    def _add_norm(self, hidden_TD: Tensor, more_TD: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(hidden_TD, more_TD, weight_D, self.config.rms_norm_eps)

    def _embed(self, token_ids: Tensor) -> Tensor:
        if self._tp_size == 1:
            return F.embedding(token_ids, self._embedding_VD)
        shard = len(self._embedding_VD)
        local = token_ids - self._tp_rank * shard
        inside = (local >= 0) & (local < shard)
        hidden_TD = F.embedding(local * inside, self._embedding_VD) * inside[:, None]
        return self._all_reduce(hidden_TD)

    def _logits(self, hidden_SD: Tensor) -> Tensor:
        logits = linear(hidden_SD, self._output_VD)
        if self._tp_size == 1:
            return logits
        shards = [torch.empty_like(logits) for _ in range(self._tp_size)]
        dist.all_gather(shards, logits, group=self._group)
        return torch.cat(shards, dim=-1)[:, : self.config.vocab_size]

    def _all_reduce(self, partial: Tensor) -> Tensor:
        if self._tp_size > 1:
            dist.all_reduce(partial, group=self._group)
        return partial

    def _check_shapes(self) -> None:
        """UserError where the weights are of another architecture."""
        config, tp = self.config, self._tp_size
        layer, attention = self._layers[0], config.num_heads * config.head_dim // tp
        ffn, mlp = config.ffn_hidden_size // tp, layer.feed_forward
        if isinstance(mlp, Experts):  # whole experts on some ranks, or a part of each on all of them
            ranks = tp if self._expert_ranks is None else self._expert_ranks.size
            ffn = config.ffn_hidden_size * config.num_experts // (ranks * len(mlp.held))
            if self._expert_ranks is not None and list(mlp.held) != list(self._expert_ranks.numbers):
                raise UserError(
                    f"the weights have experts {list(mlp.held)} of this rank's {self._expert_ranks.numbers}"
                )
            mlp = next(iter(mlp.held.values()))
        vocabulary = -(-config.vocab_size // tp)  # padded with rows that are cut off again
        fused = (config.num_heads // tp + 2 * self._num_groups) * config.head_dim
        wanted = {
            "embedding.word_embeddings.weight": (
                self._embedding_VD,
                (vocabulary, config.hidden_size),
            ),
            "output_layer.weight": (self._output_VD, (vocabulary, config.hidden_size)),
            "linear_qkv.weight": (layer.qkv_CD, (fused, config.hidden_size)),
            "linear_proj.weight": (layer.proj_DC, (config.hidden_size, attention)),
            "linear_fc1.weight": (mlp.gate_up_FD, (2 * ffn, config.hidden_size)),
            "linear_fc2.weight": (mlp.down_DF, (config.hidden_size, ffn)),
        }
        for name, (tensor, shape) in wanted.items():
            if tuple(tensor.shape) != shape:
                raise UserError(f"{name} has shape {tuple(tensor.shape)}, the configuration asks for {shape}")


class _Reader:
    """Looks weights up by name; `taken` are those that were asked for."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights = weights
        self.taken: dict[str, Weight] = {}

    def weight(self, name: str) -> Weight:
        if name not in self._weights:
            raise UserError(f"the weights lack {name!r}: the checkpoint is of another architecture")
        found = self._weights[name]
        self.taken[name] = found if isinstance(found, Fp8Weight) else found.detach()
        return self.taken[name]

    def __getitem__(self, name: str) -> Tensor:
        found = self.weight(name)
        assert isinstance(found, Tensor), f"{name} is in FP8, where only projections are"
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._weights


def _layer_weights(
    reader: _Reader, config: ModelConfig, layer: int, projection: Callable[[str], Weight]
) -> LayerWeights:
    attention, mlp = f"decoder.layers.{layer}.self_attention.", f"decoder.layers.{layer}.mlp."
    return LayerWeights(
        attention_norm_D=reader[attention + "linear_qkv.layer_norm_weight"],
        qkv_CD=projection(attention + "linear_qkv.weight"),
        qkv_bias_C=reader[attention + "linear_qkv.bias"] if config.qkv_bias else None,
        query_norm_H=reader[attention + "q_layernorm.weight"] if config.qk_norm else None,
        key_norm_H=reader[attention + "k_layernorm.weight"] if config.qk_norm else None,
        proj_DC=projection(attention + "linear_proj.weight"),
        mlp_norm_D=reader[
            f"decoder.layers.{layer}.pre_mlp_layernorm.weight"
            if config.num_experts
            else mlp + "linear_fc1.layer_norm_weight"
        ],
        feed_forward=_experts(reader, config, mlp, projection)
        if config.num_experts
        else _feed_forward(mlp, projection),
    )


def _feed_forward(prefix: str, projection: Callable[[str], Weight]) -> FeedForward:
    return FeedForward(projection(prefix + "linear_fc1.weight"), projection(prefix + "linear_fc2.weight"))


def _experts(reader: _Reader, config: ModelConfig, mlp: str, projection: Callable[[str], Weight]) -> Experts:
    """Those experts that the given weights have; UserError where they have none."""
    prefixes = {number: f"{mlp}experts.local_experts.{number}." for number in range(config.num_experts)}
    held = {
        number: _feed_forward(prefix, projection)
        for number, prefix in prefixes.items()
        if prefix + "linear_fc1.weight" in reader
    }
    if not held:
        raise UserError(
            f"the weights lack {prefixes[0]}linear_fc1.weight and all other experts of that layer"
        )
    return Experts(reader[mlp + "router.weight"], held)
