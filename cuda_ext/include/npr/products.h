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
  // Steps in a vector of stored elements: a block of such vectors, one an output, is transposed into vectors of
  // outputs.
  static constexpr int kBlockSteps = kVectorBytes / static_cast<int>(sizeof(Stored));

  static Vec<Sum> load(const Stored* from) { return npr::load(from); }
  static Vec<Sum> load_part(const Stored* from, int count) { return npr::load_part(from, count); }
  static Vec<Sum> broadcast(const Stored* from) { return npr::broadcast<Sum>(widen(*from)); }
  static Vec<Sum> broadcast_first(const Stored* from) { return broadcast(from); }
  static Vec<Sum> add(Vec<Sum> sum, Vec<Sum> a, Vec<Sum> b) { return sum + a * b; }

  // A vector of stored elements as it lies, pairs of bfloat16 as the bits of a float.
  static Vec<Sum> load_block(const Stored* from) {
    Vec<Sum> bits;
    std::memcpy(&bits, from, sizeof(bits));
    return bits;
  }
  static Vec<Sum> load_block_part(const Stored* from, int count) {  // zero beyond `count`
    Vec<Sum> bits{};
    std::memcpy(&bits, from, static_cast<std::size_t>(count) * sizeof(Stored));
    return bits;
  }
  // Step `step` of a transposed block: an element of each output.
  static Vec<Sum> step_of(const Vec<Sum>* block, int step) {
    if constexpr (std::is_same_v<Stored, BFloat16>) {
      typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
      const Bits pair = reinterpret_cast<Bits>(block[step / 2]);
      return reinterpret_cast<Vec<float>>(step % 2 == 0 ? pair << 16 : pair & 0xFFFF0000U);
    } else {
      return block[step];
    }
  }
};

#if defined(NPR_ISA_AVX512_BF16)
// Two products a lane (vdpbf16ps): sums in float32, rounded to nearest; subnormal numbers count as zero. Operands are
// pairs of bfloat16 that only pass through as bits of a float.
struct PairProducts {
  using Stored = BFloat16;
  using Sum = float;
  static constexpr int kPerLane = 2;
  static constexpr int kBlockSteps = kLanes<float>;

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
  static Vec<float> load_block(const BFloat16* from) { return load(from); }
  static Vec<float> load_block_part(const BFloat16* from, int count) { return load_part(from, count); }
  static Vec<float> step_of(const Vec<float>* block, int step) { return block[step]; }
};
#endif

NPR_ISA_END
