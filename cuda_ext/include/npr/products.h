// What a lane of a vector multiplies and adds: one product, or where the level has the instruction two of bfloat16.
#pragma once

#include "npr/simd.h"

#if defined(NPR_ISA_AVX512_BF16)
#include <immintrin.h>
#endif

NPR_ISA_BEGIN

// One product a lane; bfloat16 is widened before.
template <typename StoredType>
struct SingleProducts {
  using Stored = StoredType;
  using Sum = ComputeOf<Stored>;
  static constexpr int kPerLane = 1;

  static Vec<Sum> load(const Stored* from) { return npr::load(from); }
  static Vec<Sum> load_part(const Stored* from, int count) { return npr::load_part(from, count); }
  static Vec<Sum> broadcast(const Stored* from) { return npr::broadcast<Sum>(widen(*from)); }
  static Vec<Sum> broadcast_first(const Stored* from) { return broadcast(from); }
  static Vec<Sum> add(Vec<Sum> sum, Vec<Sum> a, Vec<Sum> b) { return sum + a * b; }
};

#if defined(NPR_ISA_AVX512_BF16)
// Two products a lane (vdpbf16ps): sums in float32, rounded to nearest; subnormal numbers count as zero. Operands are
// pairs of bfloat16 that only pass through as bits of a float.
struct PairProducts {
  using Stored = BFloat16;
  using Sum = float;
  static constexpr int kPerLane = 2;

  static Vec<float> load(const BFloat16* from) {
    Vec<float> pairs;
    std::memcpy(&pairs, from, sizeof(pairs));
    return pairs;
  }
  static Vec<float> load_part(const BFloat16* from, int count) {  // zero beyond `count`
    const __mmask32 lanes = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
    return reinterpret_cast<Vec<float>>(_mm512_maskz_loadu_epi16(lanes, from));
  }
  static Vec<float> broadcast(const BFloat16* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof(pair));
    return reinterpret_cast<Vec<float>>(_mm512_set1_epi32(pair));
  }
  // Of a pair whose second half would lie beyond the row.
  static Vec<float> broadcast_first(const BFloat16* from) {
    return reinterpret_cast<Vec<float>>(_mm512_set1_epi32(from->bits));
  }
  static Vec<float> add(Vec<float> sum, Vec<float> a, Vec<float> b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#endif

NPR_ISA_END
