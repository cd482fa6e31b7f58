"""Compiles the GPU's operators for sm_90 without a GPU, at Qwen3-4B's shape: a line each with its shared memory."""

from triton import compile as compile_kernel
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from npr_ext.triton import categorical as triton_categorical
from npr_ext.triton import decoder as triton_decoder
from npr_ext.triton import fp8 as triton_fp8
from npr_ext.triton import paged as triton_paged

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 << 10  # of a block, at most
TYPES = {"bf16": "*bf16", "fp32": "*fp32"}


def check(kernel: JITFunction, types: str, constants: dict[str, object], **options: int) -> None:
    """`types` of the arguments that are no constants, in their order."""
    given = iter(types.split())
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else next(given) for name in names}
    assert next(given, None) is None, f"{kernel.__name__} has fewer arguments than types are given"
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    compiled = compile_kernel(ASTSource(kernel, signature, constexprs), target=HOPPER, options=options)
    assert "cubin" in compiled.asm
    assert compiled.metadata.shared <= SHARED_BYTES, (kernel.__name__, constants, compiled.metadata.shared)
    print(f"{kernel.__name__:14} {compiled.metadata.shared:7} bytes shared  {constants}")


def attention(dtype: str, *, alone: bool, splits: int) -> None:
    x = TYPES[dtype]
    types = f"{x} {x} {x} *i32 *i32 *i32 *i32 {x} *fp32 *fp32 *fp32 i32 fp32"
    shape = {"dim": 128, "block_dim": 128, "group": 4, "num_kv_heads": 8, "block_keys": 64}
    constants = shape | {"block_rows": 16 if alone else 64, "splits": splits, "alone": alone}
    stages = triton_paged.stages_of(2 if dtype == "bf16" else 4)
    check(triton_paged._attend_run, types, constants, num_stages=stages)


def main() -> None:
    for alone, splits in ((True, 1), (True, 32), (False, 4)):
        attention("bf16", alone=alone, splits=splits)
    attention("fp32", alone=False, splits=1)
    merged = {"dim": 128, "block_dim": 128, "splits": 32, "block_splits": 32}
    check(triton_paged._merge_splits, "*fp32 *fp32 *fp32 *bf16", merged)
    heads = {"group": 4, "num_kv_heads": 8, "half": 64, "block_half": 64}
    tensors = "*bf16 *bf16 *bf16 *bf16 *bf16 *i32 *i32 *bf16 *bf16 *bf16 fp32"
    check(triton_decoder._split_heads, tensors, heads | {"has_norm": True}, num_warps=1)
    without = tensors.replace("*bf16 *bf16 *bf16", "*bf16", 1)
    none = {"query_norm": None, "key_norm": None, "has_norm": False}
    check(triton_decoder._split_heads, without, heads | none, num_warps=1)
    for adds in (True, False):
        row = {"width": 2560, "block": 4096, "adds": adds}
        check(triton_decoder._rms_norm, "*bf16 *bf16 *bf16 *bf16 *bf16 fp32", row, num_warps=8)
    check(triton_decoder._silu_mul, "*bf16 *bf16 i32", {"block": 1024})
    row = {"width": 9728, "block": 16_384}
    check(triton_fp8._quantize_rows, "*bf16 *fp8e4nv *fp32 fp32 fp32", row, num_warps=16)
    for values in ("fp8e4nv", "fp8e5"):
        tile = {"tile": triton_fp8.TILE, "writes_rows": True, "writes_columns": True}
        types = f"*bf16 *fp32 *{values} *{values} i32 i32"
        check(triton_fp8._quantize, types, tile, num_warps=triton_fp8.WARPS)
    turned = {"rows_RC": None, "tile": triton_fp8.TILE, "writes_rows": False, "writes_columns": True}
    check(triton_fp8._quantize, "*fp8e4nv *fp32 *fp8e4nv i32 i32", turned, num_warps=triton_fp8.WARPS)
    for logits, wide in (("bf16", tl.float32), ("fp64", tl.float64)):
        part = {"part_size": triton_categorical.PART, "wide": wide}
        of_rows = "*fp64" if logits == "fp64" else "*fp32"
        sums = f"{of_rows} *i32 *fp64 *fp64"
        check(triton_categorical._parts, f"*{logits} *fp32 {sums} i32 i32", part, num_warps=8)
        types = f"*{logits} *fp64 *fp32 {sums} *i64 {of_rows} {of_rows} i32 i32"
        check(triton_categorical._rows, types, part | {"block_parts": 64}, num_warps=8)
    print("compiled")


if __name__ == "__main__":
    main()
