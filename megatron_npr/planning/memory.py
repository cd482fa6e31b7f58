"""Bytes per GPU by part, of the fullest pipeline stage.

What stays: weights, gradients (fp32 buffers), optimizer state (sharded over the ranks that hold the same weights), the KV
cache, the engine's own copies of weights. What comes and goes: activations with the workspace of the loss, the workspace
of decoding, or the new weights of an engine until all have arrived; the largest counts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_npr.planning.job import Layout, Modules, Workload
from megatron_npr.sharding.architecture import Architecture
from megatron_npr.sharding.catalog import Kind, Place, engine_cut, kinds
from megatron_npr.sharding.cuts import local_size
from npr_engine.model.architecture import is_projection

GRADIENT_BYTES = 4  # Megatron's buffers accumulate in fp32
LOSS_CHUNK = 4096  # rows of logits at a time; megatron_npr.model.log_probs
RUNTIME_BYTES = 2.0e9  # CUDA context, NCCL's buffers, library workspaces
USABLE = 0.94  # of a GPU's memory: the allocator's fragments take the rest
SWIGLU: dict[Modules, tuple[int, int]] = {"cpu": (3, 3), "torch": (4, 4), "transformer engine": (5, 4)}
"""Tensors as wide as an MLP: (kept for the backward pass, of gradients at once in it).

Kept are gate and up together and their product; by PyTorch's operators also silu(gate); by Megatron's own activation, which
adds an offset to up, also that sum. Gradients are those of the product and of gate and up together; PyTorch's operators hold
the latter apart before they join them."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU; `stage` is the pipeline stage that they are of."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    kv: float
    engine_weights: float
    workspace: float

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """By name, in bytes."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "stage"}

    @property
    def largest(self) -> str:
        """Name of the largest part."""
        parts = self.parts()
        return max(parts, key=parts.__getitem__)


def memory_of(architecture: Architecture, layout: Layout, work: Workload) -> Memory:
    """Bytes on a GPU of the fullest pipeline stage: in every layout the first or the last, or one with more layers than
    these."""
    stages = [_stage_memory(architecture, layout, work, stage) for stage in range(layout.pp)]
    return max(stages, key=lambda memory: memory.total)


def parameters_of(architecture: Architecture, layout: Layout, stage: int) -> tuple[int, int]:
    """(dense, expert) elements on a rank of a pipeline stage; padding and a tied copy on the last stage included."""
    trainer = layout.trainer(architecture)
    num_layers = trainer.stage_of_layers().count(stage)
    dense = expert = 0
    for kind in kinds(architecture):
        copies = _copies(kind, architecture, layout, stage, num_layers)
        if kind.place is Place.EXPERT:
            expert += copies * local_size(kind.matrix, kind.cut, trainer.etp)
        else:
            dense += copies * local_size(kind.matrix, kind.cut, layout.tp)
    return dense, expert


def projections_of(architecture: Architecture, layout: Layout, stage: int) -> int:
    """Those of these elements that are projections of layers, which FP8 training rounds."""
    trainer = layout.trainer(architecture)
    num_layers = trainer.stage_of_layers().count(stage)
    return sum(
        _copies(kind, architecture, layout, stage, num_layers)
        * local_size(kind.matrix, kind.cut, trainer.etp if kind.place is Place.EXPERT else layout.tp)
        for kind in kinds(architecture)
        if is_projection(kind.pattern)
    )


def engine_parameters(architecture: Architecture, layout: Layout) -> int:
    """Elements on a rank of an engine replica, all layers."""
    engine, total = layout.engine(architecture), 0
    for kind in kinds(architecture):
        if kind.place is Place.EXPERT:
            held, size = architecture.num_layers * architecture.num_experts // engine.ep, engine.etp
        else:
            held, size = architecture.num_layers if kind.place is Place.LAYER else 1, engine.tp
        total += held * local_size(kind.matrix, engine_cut(kind, size), size)
    return total


def kv_bytes_per_token(architecture: Architecture, engine_tp: int, bytes_per_element: int) -> int:
    """Keys and values of one token on one rank, all layers; fewer KV heads than ranks are held several times."""
    heads = -(-architecture.num_kv_heads // engine_tp)
    return 2 * architecture.num_layers * heads * architecture.head_dim * bytes_per_element


def activation_bytes_per_token(
    architecture: Architecture, layout: Layout, work: Workload
) -> tuple[float, float]:
    """(kept until backward, of the layer whose backward pass runs) per token of a row and layer on one rank.

    As the modules keep them (counted with torch's saved-tensor hooks): the stream of hidden states before each norm, and what
    the norm makes of it; fused QKV, of which keys and values are views; queries once more where they are normalised; queries
    and keys rotated, attention's output and log-sum-exp; the angles; SWIGLU. Experts keep the rows that were sent to them, and
    the product also times its probability; the router reads its rows in fp32, and keeps who goes where. What FP8 projections
    multiply is kept in FP8, attention's output as it is in any case.
    """
    size, tp = work.bytes_per_weight, layout.tp
    stream = size * architecture.hidden_size / (tp if layout.sequence_parallel else 1)
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    attention = architecture.qkv_rows + (3 if architecture.qk_norm else 2) * queries + keys
    rounded = size if work.fp8 is None else 1
    normed = stream * rounded / size
    kept_attention = stream + normed + size * (attention / tp + 4 * architecture.head_dim)
    kept_attention += 4 * architecture.num_heads / tp + (queries / tp if _keeps_output_twice(work) else 0)
    widths, gradient_widths = SWIGLU[work.modules]
    width, product = (each * architecture.ffn_hidden_size / tp for each in (size, rounded))
    if architecture.num_experts:
        chosen = architecture.experts_per_token
        routing = (5 * architecture.num_experts + 24 * chosen) / tp + stream * 4 / size
        rows = rounded * architecture.hidden_size / tp
        # The recomputed part begins behind the norm, which a dense MLP does itself.
        kept_norm, kept_mlp = stream, routing + chosen * (rows + widths * width + product)
        width *= chosen
    else:
        kept_norm, kept_mlp = 0.0, normed + (widths - 1) * width + product
    gradients = gradient_widths * width
    if work.recompute == "full":
        return stream, kept_attention + stream + kept_mlp + gradients
    if work.recompute == "selective":
        return kept_attention + stream + kept_norm, kept_mlp + gradients
    return kept_attention + stream + kept_mlp, gradients


def _keeps_output_twice(work: Workload) -> bool:
    """Attention's output also in FP8, as its projection multiplies it: where that does not round it once more for backward, as
    Transformer Engine does if the scale is that of the tensor at hand."""
    return work.fp8 is not None and (work.fp8 == "delayed" or work.modules != "transformer engine")


def _copies(kind: Kind, architecture: Architecture, layout: Layout, stage: int, num_layers: int) -> int:
    """How many weights of a kind a rank of a stage holds."""
    last = stage == layout.pp - 1
    if kind.place is Place.EMBEDDING:
        return int(stage == 0 or (last and architecture.tied_embeddings))
    if kind.place is Place.LAST:
        return int(last)
    return num_layers * (architecture.num_experts // layout.ep if kind.place is Place.EXPERT else 1)


def _stage_memory(architecture: Architecture, layout: Layout, work: Workload, stage: int) -> Memory:
    size = work.bytes_per_weight
    dense, expert = parameters_of(architecture, layout, stage)
    dense_copies = layout.dp * layout.cp
    expert_copies = layout.tp * dense_copies // layout.ep
    state = 12 if size == 2 else 8  # both moments in fp32, and a master copy where the weights are bf16
    keep, busy = activation_bytes_per_token(architecture, layout, work)
    trainer = layout.trainer(architecture)
    num_layers = trainer.stage_of_layers().count(stage)
    tokens = work.row_tokens / layout.cp
    activations = tokens * keep * num_layers * _rows_in_flight(layout, stage)
    # the loss has run its backward pass before the layers run theirs
    training = activations + max(tokens * busy, _loss_workspace(architecture, layout, work, stage))
    decoding = _decoding_workspace(architecture, layout, work) if work.kv_slots else 0.0
    engine = _engine_copy(architecture, layout, work)
    return Memory(
        stage=stage,
        weights=size * (dense + expert) + _rounded_copies(architecture, layout, work, stage),
        gradients=GRADIENT_BYTES * (dense + expert),
        optimizer=state * (dense / dense_copies + expert / expert_copies),
        activations=activations,
        kv=work.kv_slots * kv_bytes_per_token(architecture, layout.engine_tp, size),
        # An update holds what has arrived once more, when neither trainer nor engine works (weight_sync.exchange).
        engine_weights=engine + max(engine - max(training, decoding), 0.0),
        workspace=RUNTIME_BYTES + max(training, decoding) - activations,
    )


def _rounded_copies(architecture: Architecture, layout: Layout, work: Workload, stage: int) -> float:
    """Bytes of projections in FP8, as they are and transposed: the model's own, in the place of its two bytes, or further ones,
    which Transformer Engine keeps from the first micro-batch of a step to the last."""
    further = work.fp8 is not None and not work.fp8_parameters and work.modules == "transformer engine"
    return 2.0 * projections_of(architecture, layout, stage) if further else 0.0


def _rows_in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage holds at most: 1F1B; interleaving adds a part of a round."""
    if layout.pp == 1:
        return 1.0
    if layout.vpp == 1:
        return float(layout.pp - stage)
    return layout.pp * (1 + (layout.pp - 1) / (layout.pp * layout.vpp))


def _engine_copy(architecture: Architecture, layout: Layout, work: Workload) -> float:
    """Bytes of weights that the engine holds besides the trainer's: all or, where the layouts agree, none. The trainer's in FP8
    are read as plain numbers."""
    engine = layout.engine(architecture)
    trains_them = engine.etp == 1 and layout.ep in (1, engine.ep) and not work.fp8_parameters
    if not work.kv_slots or (engine.tp == layout.tp and layout.pp == 1 and trains_them):
        return 0.0
    return float(work.bytes_per_weight * engine_parameters(architecture, layout))


def _loss_workspace(architecture: Architecture, layout: Layout, work: Workload, stage: int) -> float:
    """The last stage's: gathered hidden states with their gradient, and the wider pass over the logits (model/log_probs.py).
    Other stages: the rows that travel.

    Forward holds a chunk of logits in fp32 and their exponentials. Backward turns the logits into their gradient in place and
    in bf16 once more, and holds the vocabulary matrix's gradient in fp32 with a chunk's part of it.
    """
    size, tokens, hidden = work.bytes_per_weight, work.row_tokens / layout.cp, architecture.hidden_size
    if stage != layout.pp - 1:
        return 2 * size * tokens * hidden
    vocabulary = -(-architecture.vocab_size // layout.tp)
    logits = min(LOSS_CHUNK, tokens) * vocabulary
    forward = 8 * logits
    backward = (4 if size == 4 else 6) * logits + (4 + size) * vocabulary * hidden
    return 3 * size * tokens * hidden + max(forward, backward)


def _decoding_workspace(architecture: Architecture, layout: Layout, work: Workload) -> float:
    """One layer's activations of the largest engine step, and logits with their probabilities of all branches."""
    tp, chosen = layout.engine_tp, architecture.experts_per_token if architecture.num_experts else 1
    widest = architecture.qkv_rows / tp + 3 * chosen * architecture.ffn_hidden_size / tp
    if layout.engine_ep > tp:  # (row, expert) pairs: sent, arrived, computed, returned
        widest += 4 * chosen * architecture.hidden_size / tp
    tokens = work.batch_tokens * work.bytes_per_weight * (3 * architecture.hidden_size + widest)
    return tokens + work.max_running_branches * architecture.vocab_size * 12
