// What the CPU's operators compute: a table of functions for each instruction set and storage type.
//
//   NAME_op.cpp (checks tensors, the base) -> cpu_operators(type).NAME -> NAME_cpu.h, once for each level (isa_*.cpp)
//
// The functions take contiguous tensors of one storage type that fit each other, and write into those given last.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "npr/isa.h"
#include "npr/token_run.h"

namespace npr {

struct CpuOperators {
  void (*linear)(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& output);
  void (*paged_attention)(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                          const at::Tensor& block_tables, const at::Tensor& rows, const at::Tensor& lengths,
                          const std::vector<TokenRun>& runs, double scale, const at::Tensor& output);
  // These two take what they compute with: float32 for bfloat16.
  void (*branch_attention_forward)(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const at::Tensor& plan, double scale, const at::Tensor& output,
                                   const at::Tensor& log_sums);
  void (*branch_attention_backward)(const at::Tensor& gradient, const at::Tensor& q, const at::Tensor& k,
                                    const at::Tensor& v, const at::Tensor& output, const at::Tensor& log_sums,
                                    const at::Tensor& plan, double scale, const at::Tensor& dq, const at::Tensor& dk,
                                    const at::Tensor& dv);
  void (*rms_norm)(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& output);
  // weight_gradients [runs, D], zero before: of every run of `rows_per_run` rows.
  void (*rms_norm_backward)(const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, double eps,
                            int64_t rows_per_run, const at::Tensor& x_gradient, const at::Tensor& weight_gradients);
  void (*silu_mul)(const at::Tensor& gate_up, const at::Tensor& output);
  void (*silu_mul_backward)(const at::Tensor& gradient, const at::Tensor& gate_up, const at::Tensor& output);
  void (*split_heads)(const at::Tensor& qkv, const at::Tensor& query_norm, const at::Tensor& key_norm,
                      const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& positions,
                      const at::Tensor& slots, double eps, const at::Tensor& k_cache, const at::Tensor& v_cache,
                      const at::Tensor& output);
  void (*categorical)(const at::Tensor& logits, const at::Tensor& uniforms, const at::Tensor& temperatures,
                      const at::Tensor& indices, const at::Tensor& policy, const at::Tensor& sampler);
};

struct CpuIsa {
  const char* name;
  CpuOperators float32;
  CpuOperators float64;
  CpuOperators bfloat16;
};

CpuIsa base_isa();
#if NPR_HAS_AVX512
CpuIsa avx512_isa();
CpuIsa avx512_bf16_isa();  // those of avx512_isa, but for products of bfloat16
#endif

// Those of the instruction set in use; ValueError in the operator's name for a type that is not computed with.
const CpuOperators& cpu_operators(at::ScalarType type, const char* name);

}  // namespace npr
