// The operators of the level that the including source has chosen.
#pragma once

#include "branch_attention_cpu.h"
#include "categorical_cpu.h"
#include "cpu_operators.h"
#include "decoder_rows_cpu.h"
#include "linear_cpu.h"
#include "paged_attention_cpu.h"

namespace npr {
namespace {

template <typename Stored>
CpuOperators operators_of() {
  return {
      .linear = &linear<SingleProducts<Stored>>,
      .paged_attention = &paged_attention<SingleProducts<Stored>>,
      .branch_attention_forward = &branch_attention_forward<ComputeOf<Stored>>,
      .branch_attention_backward = &branch_attention_backward<ComputeOf<Stored>>,
      .rms_norm = &rms_norm<Stored>,
      .rms_norm_backward = &rms_norm_backward<Stored>,
      .silu_mul = &silu_mul<Stored>,
      .silu_mul_backward = &silu_mul_backward<Stored>,
      .split_heads = &split_heads<Stored>,
      .categorical = &categorical<Stored>,
  };
}

}  // namespace
}  // namespace npr
