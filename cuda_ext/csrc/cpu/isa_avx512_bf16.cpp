// What products of bfloat16 pairs (AVX512_BF16) are for.
#define NPR_ISA_AVX512_BF16
#include "cpu_operators.h"

#if NPR_HAS_AVX512
#include "linear_cpu.h"
#include "paged_attention_cpu.h"

namespace npr {

CpuIsa avx512_bf16_isa() {
  CpuIsa isa = avx512_isa();
  isa.name = "AVX512_BF16";
  isa.bfloat16.linear = &linear<PairProducts>;
  isa.bfloat16.paged_attention = &paged_attention<PairProducts>;
  return isa;
}

}  // namespace npr
#endif
