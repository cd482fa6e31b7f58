"""Instruction sets: every level computes as exactly, the right one is chosen, and no level's code is in another's way."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import npr_ext
from npr_ext import branch_attention, categorical, linear, paged_attention, split_heads
from npr_ext.errors import UserError
from npr_ext.layout.reference import reference_attention, reference_paged_attention
from npr_ext.library import ISAS, NEEDED, allowed_isas, check_processor, cpu_isa, cpu_isas
from npr_ext.ops import differentiable
from npr_ext.testing import random_layout, using_isa

EPS = 1e-6
Results = tuple[Tensor, ...]


def randn(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers that bfloat16 holds, so that every type is given the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16().to(dtype)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> Results:
    """The result, and the gradients of the inputs from a random one of the result."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    result = function(*leaves)
    return result.detach(), *torch.autograd.grad(result, leaves, randn(9, result.dtype, *result.shape))


def product(plain: bool, dtype: torch.dtype, rows: int) -> Results:
    x, weight, bias = randn(0, dtype, rows, 579), randn(1, dtype, 203, 579), randn(2, dtype, 203)
    return ((F.linear if plain else linear)(x, weight, bias),)


def norm(plain: bool, dtype: torch.dtype, rows: int) -> Results:
    x, weight = randn(0, dtype, rows, 579), randn(1, dtype, 579)
    if plain:
        return with_gradients(lambda x, weight: F.rms_norm(x, (579,), weight, EPS), x, weight)
    return with_gradients(lambda x, weight: differentiable.rms_norm(x, weight, EPS), x, weight)


def swiglu(plain: bool, dtype: torch.dtype, rows: int) -> Results:
    def plain_swiglu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    return with_gradients(plain_swiglu if plain else differentiable.silu_mul, randn(0, dtype, rows, 2 * 331))


def heads(plain: bool, dtype: torch.dtype, rows: int) -> Results:
    qkv, angles = randn(0, dtype, rows, 2 * 5 * 64), randn(1, torch.float64, rows, 32)
    cos, sin = angles.cos().bfloat16().to(dtype), angles.sin().bfloat16().to(dtype)
    if plain:
        x = qkv.view(rows, 2, 5, 64)[:, :, :4]
        low, high = x.chunk(2, dim=-1)
        c, s = cos[:, None, None], sin[:, None, None]
        turned = torch.cat((low * c - high * s, high * c + low * s), -1)
        return turned[:, :, :3].reshape(rows, 6, 64), turned[:, :, 3]
    each = torch.arange(rows, dtype=torch.int32)
    k_cache, v_cache = torch.zeros(rows, 2, 64, dtype=dtype), torch.zeros(rows, 2, 64, dtype=dtype)
    return split_heads(qkv, None, None, cos, sin, each, each, k_cache, v_cache, EPS), k_cache


def paged(plain: bool, dtype: torch.dtype, rows: int) -> Results:
    q, k, v = randn(0, dtype, rows, 6, 64), randn(1, dtype, 300, 2, 64), randn(2, dtype, 300, 2, 64)
    tables = torch.stack(
        [torch.randperm(300, generator=torch.Generator().manual_seed(i)) for i in range(rows)]
    )
    where = torch.arange(rows, dtype=torch.int32)
    job = (q, k, v, tables.int(), where, 300 - where)
    return (reference_paged_attention(*job, 64**-0.5) if plain else paged_attention(*job),)


def branches(plain: bool, dtype: torch.dtype, rows: int) -> Results:
    tokens = 100 + 20 * rows
    layout = random_layout(0, tokens, 2, 3, 0.6).layout()
    q, k, v = (randn(i, dtype, tokens, heads, 32) for i, heads in enumerate((6, 2, 2)))
    if plain:
        visible = layout.visible()
        return with_gradients(lambda q, k, v: reference_attention(q, k, v, visible, 32**-0.5), q, k, v)
    return with_gradients(lambda q, k, v: branch_attention(q, k, v, layout), q, k, v)


def draws(plain: bool, dtype: torch.dtype, rows: int) -> Results:
    """Log-probabilities of the greedy choice."""
    logits = randn(0, dtype, rows, 5003) * 4
    if plain:
        return (logits.log_softmax(1).amax(1),)
    uniforms, temperatures = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows)
    return (categorical(logits, uniforms, temperatures)[1],)


OPERATORS = [product, norm, swiglu, heads, paged, branches, draws]


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("isa", cpu_isas())
def test_at_every_level_the_error_against_float64_is_at_most_twice_that_of_pytorch(
    isa: str, operator: Callable[[bool, torch.dtype, int], Results], dtype: torch.dtype, rows: int
) -> None:
    exact = operator(True, torch.float64, rows)
    theirs = operator(True, dtype, rows)
    with using_isa(isa):
        ours = operator(False, dtype, rows)
    for each, plain, truth in zip(ours, theirs, exact, strict=True):
        unit = torch.finfo(each.dtype).eps * rms(truth)  # PyTorch's own may be right by chance, of one number
        assert rms(each - truth) <= max(2 * rms(plain - truth), unit)


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("operator", OPERATORS)
def test_at_every_level_the_number_of_threads_moves_no_bit(
    isa: str, operator: Callable[[bool, torch.dtype, int], Results]
) -> None:
    before = torch.get_num_threads()
    try:
        with using_isa(isa):
            results = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(operator(False, torch.float32, 40))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("available", "cap", "expected"),
    [
        (ISAS, "", list(ISAS)),
        (ISAS, "AVX512_BF16", list(ISAS)),
        (ISAS, "AVX512", ["AVX2", "AVX512"]),
        (ISAS, "avx512", ["AVX2", "AVX512"]),
        (ISAS, "AVX2", ["AVX2"]),
        (["AVX2"], "AVX512_BF16", ["AVX2"]),
        (["AVX2", "AVX512"], "AVX512_BF16", ["AVX2", "AVX512"]),
        (["GENERIC"], "", ["GENERIC"]),
        (["GENERIC"], "AVX2", ["GENERIC"]),
    ],
)
def test_the_cap_leaves_what_is_not_above_it(available: list[str], cap: str, expected: list[str]) -> None:
    assert allowed_isas(available, cap) == expected


@pytest.mark.parametrize("cap", ["SSE41", "AVX512_CORE", "AVX 2", "0", "native", "GENERIC"])
def test_a_cap_that_names_no_instruction_set_is_refused_with_those_that_there_are(cap: str) -> None:
    with pytest.raises(
        UserError, match=rf"^NPR_MAX_CPU_ISA is '{cap}': .*AVX2, AVX512, AVX512_BF16, or unset$"
    ):
        allowed_isas(ISAS, cap)


@pytest.mark.parametrize("name", NEEDED)
def test_a_processor_below_the_base_is_refused_in_one_line_that_names_what_it_lacks(name: str) -> None:
    capabilities = {each: each != name for each in NEEDED} | {"cpu_name": "Some Xeon"}
    with pytest.raises(
        UserError, match=rf"^this processor \(Some Xeon\) has no {name}: .*x86-64-v3"
    ) as caught:
        check_processor(capabilities)
    assert "\n" not in str(caught.value)


def test_processors_of_the_base_and_of_another_kind_are_taken() -> None:
    check_processor(dict.fromkeys(NEEDED, True))
    check_processor({"architecture": "aarch64", "neon": True})


def run_python(code: str, cap: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "NPR_MAX_CPU_ISA"}
    environment |= {} if cap is None else {"NPR_MAX_CPU_ISA": cap}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_unset_the_best_of_the_processor_is_used_and_a_cap_is_kept() -> None:
    code = "import torch, npr_ext; print(npr_ext.cpu_isa(), torch.ops.npr.cpu_isas()[-1])"
    used, best = run_python(code, None).stdout.split()
    assert used == best
    if best != "GENERIC":
        supported = [torch.cpu._is_avx2_supported(), torch.cpu._is_avx512_supported()]
        supported += [supported[-1] and torch.cpu._is_avx512_bf16_supported()]
        assert best == [name for name, has in zip(ISAS, supported, strict=True) if has][-1]
        assert run_python(code, "AVX2").stdout.split() == ["AVX2", best]


def test_a_wrong_cap_is_one_line_and_exit_code_2() -> None:
    code = (
        "from megatron_npr.cli import main; raise SystemExit(main(['draw', 'layout', '--out', 'layout.svg']))"
    )
    done = run_python(code, "AVX1024")
    assert done.returncode == 2
    assert done.stderr.startswith("npr: error: NPR_MAX_CPU_ISA is 'AVX1024'")
    assert done.stderr.count("\n") == 1


def test_the_level_in_use_can_be_asked_and_none_that_is_missing_can_be_chosen() -> None:
    for name in cpu_isas():
        with using_isa(name):
            assert cpu_isa() == name
    with pytest.raises(ValueError, match="no instruction set AVX3"), using_isa("AVX3"):
        pass


FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
# In 64-bit code the byte 62 begins nothing but EVEX, the encoding of AVX-512; masks (k0 to k7) are AVX-512 too.
BEYOND_BASE = re.compile(r"^\s*[0-9a-f]+:\t(?:(?:64|65|67) )*62 |%k[0-7]\b")
LEVEL = re.compile(r"^_Z+N[KVRO]*3npr\d+(base|avx512_bf16|avx512)(?=\d)")


@pytest.mark.skipif(torch.ops.npr.cpu_isas()[0] != "AVX2", reason="the levels are those of x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_no_function_outside_a_levels_namespace_needs_more_than_the_base() -> None:
    """Otherwise the linker, which keeps one of equal functions, could give the base what only some processors run."""
    (library,) = Path(npr_ext.__file__).parent.glob("_operators*.so")
    command = ["objdump", "--disassemble", "--wide", str(library)]
    name = ""
    beyond: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith(">:\n") and (begun := FUNCTION.match(line)):
                name = begun[1]
            elif BEYOND_BASE.search(line):
                beyond[name] += 1
                pairs[name] += "vdpbf16ps" in line
    levels = {name: found[1] if (found := LEVEL.match(name)) else "none" for name in beyond}
    assert [name for name in beyond if levels[name] not in ("avx512", "avx512_bf16")] == []
    assert {"avx512", "avx512_bf16"} == set(levels.values())  # the names are there, the levels are used
    assert {levels[name] for name in beyond if pairs[name]} == {"avx512_bf16"}
