"""Which layers and number formats a device gets: names that Transformer Engine's modules would have, FP8 or a clear refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from pydantic import ValidationError

from megatron_npr.config import Fp8Settings, ParallelSettings, Stage3Config, load_config
from megatron_npr.data.packing import RowPlan, row_length
from megatron_npr.demo.base import FOLDER
from megatron_npr.hf.huggingface import read_model_config
from megatron_npr.model import linears
from megatron_npr.model.layers import LayoutCache, layer_spec
from megatron_npr.model.linears import (
    SCALED_MM,
    TRANSFORMER_ENGINE,
    LinearModules,
    describe,
    fp8_obstacle,
    fp8_options,
    linear_modules,
    token_multiple,
)
from megatron_npr.model.policy_builder import build_policy
from megatron_npr.model.transformer_config import transformer_config
from megatron_npr.runtime.process_world import World, megatron_context
from megatron_npr.stages import stage3
from npr_engine.model.transformer import ModelConfig
from npr_ext.errors import UserError
from tests.support.families import save_family
from tests.support.places import CONFIGS

CPU = torch.device("cpu")
DEMO = CONFIGS / "demo" / "stage3.toml"


def config_of(
    world: World,
    model: ModelConfig,
    fp8: Fp8Settings | None = None,
    linears: LinearModules | None = None,
) -> object:
    return transformer_config(
        model, world, dtype=torch.bfloat16, parallel=ParallelSettings(), fp8=fp8, linears=linears
    )


@pytest.mark.parametrize("family", ["qwen3 tied", "qwen3 untied", "qwen2", "llama", "qwen3_moe"])
def test_weights_have_the_names_that_megatron_gives_transformer_engines(
    family: str, world: World, tmp_path: Path
) -> None:
    """Megatron's local layers are renamed in checkpoints, by a table of its own, to what its Transformer Engine layers have."""
    model = read_model_config(save_family(family, tmp_path))
    policy = build_policy(model, world)
    spec = get_gpt_layer_local_spec(
        num_experts=model.num_experts or None, qk_layernorm=model.qk_norm, normalization="RMSNorm"
    )
    with megatron_context():
        theirs = GPTModel(
            config=policy.config,
            transformer_layer_spec=spec,
            vocab_size=model.vocab_size,
            max_sequence_length=64,
            share_embeddings_and_output_weights=model.tied_embeddings,
            position_embedding_type="rope",
        )

        def names(one: torch.nn.Module) -> set[str]:
            found = {tensor.key for tensor in one.sharded_state_dict().values()}
            return {name for name in found if not name.endswith("_extra_state")}

        ours = names(policy.chunks[0])
        expected = names(theirs)
        if model.num_experts:
            # The table is of dense layers; Transformer Engine's spec has no norm in a router's layer.
            own_norm = "mlp.linear_fc1.layer_norm_weight"
            expected = {name.replace(own_norm, "pre_mlp_layernorm.weight") for name in expected}
        assert ours == expected
        assert len(ours) > 8


def test_the_layer_of_transformer_engine_is_ours_with_other_linear_layers() -> None:
    """Class for class: what a GPU with Transformer Engine builds differs in the projections alone."""
    layouts = LayoutCache()
    ours = layer_spec(layouts, qk_norm=True).submodules
    theirs = layer_spec(layouts, qk_norm=True, linears=linears.TRANSFORMER_ENGINE).submodules
    attention = theirs.self_attention.submodules
    assert attention.linear_qkv is transformer_engine.TELayerNormColumnParallelLinear
    assert attention.linear_proj is transformer_engine.TERowParallelLinear
    assert theirs.mlp.submodules.linear_fc1 is transformer_engine.TELayerNormColumnParallelLinear
    assert theirs.mlp.submodules.linear_fc2 is transformer_engine.TERowParallelLinear
    assert attention.core_attention == ours.self_attention.submodules.core_attention
    assert attention.q_layernorm is ours.self_attention.submodules.q_layernorm


def test_a_cpu_has_megatrons_own_layers_and_says_so() -> None:
    assert linear_modules(CPU) is linears.OWN
    said = "linear layers: Megatron-Core; Adam: torch; gradient accumulation: after the GEMM"
    assert describe(CPU) == said
    assert "linear layers: Megatron-Core, FP8 by torch._scaled_mm; Adam" in describe(CPU, fp8=True)


def test_on_a_gpu_transformer_engine_comes_first_and_torchs_fp8_only_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda", 0)
    for installed, expected in (
        (True, (linears.TRANSFORMER_ENGINE, linears.TRANSFORMER_ENGINE)),
        (False, (linears.OWN, linears.SCALED_MM)),
    ):
        monkeypatch.setattr(transformer_engine, "HAVE_TE", installed)
        assert (linear_modules(gpu), linear_modules(gpu, fp8=True)) == expected


NEEDS_ENGINE = (
    "fp8.recipe = '{}' needs the package transformer-engine, which is not installed: install it (extra gpu) or choose "
    "fp8.recipe = 'tensorwise'"
)


@pytest.mark.parametrize(
    "recipe, device, capability, engine, obstacle",
    [
        ("tensorwise", "H100", (9, 0), "2.20.2", None),
        ("delayed", "L40S", (8, 9), "2.20.2", None),
        (
            "blockwise",
            "L40S",
            (8, 9),
            "2.20.2",
            "L40S has compute capability 8.9, recipe blockwise needs 9.0",
        ),
        ("delayed", "A100", (8, 0), "2.20.2", "A100 has compute capability 8.0, recipe delayed needs 8.9"),
        ("tensorwise", "H100", (9, 0), None, None),
        ("delayed", "H100", (9, 0), None, NEEDS_ENGINE.format("delayed")),
        ("blockwise", "H100", (9, 0), None, NEEDS_ENGINE.format("blockwise")),
        (
            "tensorwise",
            "A100",
            (8, 0),
            None,
            "A100 has compute capability 8.0, recipe tensorwise needs 8.9 (with the package transformer-engine, extra gpu, "
            "or with torch alone)",
        ),
        (
            "tensorwise",
            "cpu",
            None,
            None,
            "cpu is no GPU, recipe tensorwise needs 8.9 (with the package transformer-engine, extra gpu, or with torch "
            "alone)",
        ),
    ],
)
def test_fp8_runs_where_device_and_package_allow_it(
    recipe: str, device: str, capability: tuple[int, int] | None, engine: str | None, obstacle: str | None
) -> None:
    assert fp8_obstacle(recipe, device, capability, engine) == obstacle


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_fp8_on_a_cpu_ends_a_run_before_it_starts(tmp_path: Path) -> None:
    # One thread: the session sets their number for this whole process, and so for the tests after this one.
    words = ["--run.dir", str(tmp_path), "--run.threads", "1"]
    words += ["--model.path", str(FOLDER), "--model.dtype", "fp8"]
    config = load_config(Stage3Config, DEMO, words)
    with pytest.raises(
        UserError, match=r"model\.dtype = 'fp8' cannot run here: cpu is no GPU.*transformer-engine"
    ):
        stage3.run(config)


def test_layers_at_both_ends_stay_in_bf16(world: World) -> None:
    model = ModelConfig(8, 64, 4, 2, 16, 96, 97)
    settings = Fp8Settings(recipe="blockwise", format="e4m3", first_layers_bf16=2, last_layers_bf16=1)
    config = config_of(world, model, settings, TRANSFORMER_ENGINE)
    assert (config.fp8, config.fp8_recipe, config.scaled_mm) == ("e4m3", "blockwise", None)
    kept = [layer for layer in range(8) if is_first_last_bf16_layer(config, layer)]
    assert kept == [0, 1, 7]
    with pytest.raises(UserError, match=r"fp8\.first_layers_bf16 = 5 is more than the 4 layers"):
        fp8_options(Fp8Settings(first_layers_bf16=5), TRANSFORMER_ENGINE, num_layers=8, stages=2)
    with pytest.raises(UserError, match=r"fp8\.last_layers_bf16 = 9 is more than the 8 layers"):
        fp8_options(Fp8Settings(last_layers_bf16=9), SCALED_MM, num_layers=8, stages=1)
    with pytest.raises(UserError, match=r"fp8\.parameters = true needs the package transformer-engine"):
        fp8_options(Fp8Settings(parameters=True), SCALED_MM, num_layers=8, stages=1)
    with pytest.raises(ValidationError, match=r"recipe delayed scales all layers at once"):
        Fp8Settings(recipe="delayed", last_layers_bf16=1)


@pytest.mark.parametrize("recipe", ["delayed", "blockwise"])
def test_recipes_that_torch_does_not_have_are_refused_with_what_to_do(recipe: str, world: World) -> None:
    model = ModelConfig(8, 64, 4, 2, 16, 96, 97)
    with pytest.raises(UserError) as refused:
        config_of(world, model, Fp8Settings(recipe=recipe), SCALED_MM)
    assert str(refused.value) == NEEDS_ENGINE.format(recipe)


def test_megatron_is_not_told_of_torchs_fp8(world: World) -> None:
    """Its own setting makes it call Transformer Engine, for recomputation and for experts."""
    model = ModelConfig(8, 64, 4, 2, 16, 96, 97)
    config = config_of(world, model, Fp8Settings(format="e4m3"), SCALED_MM)
    assert (config.fp8, config.scaled_mm) == (None, "e4m3")


def test_rows_suit_fp8_gemms_on_every_rank(world: World) -> None:
    model = ModelConfig(8, 64, 4, 2, 16, 96, 97)
    assert token_multiple(config_of(world, model)) == 1
    for library in (TRANSFORMER_ENGINE, SCALED_MM):
        config = config_of(world, model, Fp8Settings(), library)
        assert token_multiple(config) == 16
    config.context_parallel_size, config.tensor_model_parallel_size, config.sequence_parallel = 3, 4, True
    assert token_multiple(config) == 16 * 3 * 4
    length = row_length([RowPlan((), 700)], multiple=token_multiple(config))
    assert length == 768 and length % 64 == 0


@pytest.mark.parametrize(("context", "tensor"), [(3, 1), (3, 2), (5, 4), (16, 8), (1, 3)])
def test_rows_have_equal_shares_for_any_number_of_ranks(context: int, tensor: int, world: World) -> None:
    config = config_of(world, ModelConfig(8, 64, 4, 2, 16, 96, 97))
    config.context_parallel_size, config.tensor_model_parallel_size, config.sequence_parallel = (
        context,
        tensor,
        True,
    )
    for tokens in (1, 64, 700):
        length = row_length([RowPlan((), tokens)], multiple=token_multiple(config))
        assert length >= tokens and length % (context * tensor) == 0
