// Vectors as wide as the level's registers by the compiler's vector extension: one source for AVX-512, AVX2 and others.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "npr/isa.h"

NPR_ISA_BEGIN

constexpr int kVectorBytes = NPR_VECTOR_BYTES;
constexpr int kVectorRegisters = kVectorBytes == 64 ? 32 : 16;

template <typename T>
struct VectorOf {
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::Type;
template <typename T>
constexpr int kLanes = VectorOf<T>::kLanes;

template <typename T>
inline int round_up_to_lanes(int count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

// Loads a value now and once: GCC else reads it from memory again at each use, which in a tile of products keeps the
// loads busy instead of the multipliers (4 rows x 4 outputs in float32: half the speed).
template <typename V>
inline V in_register(V value) {
#if NPR_VECTOR_BYTES == 64
  __asm__("" : "+v"(value));
#elif defined(__x86_64__)
  __asm__("" : "+x"(value));
#endif
  return value;
}

// Storage types: float and double are computed with as they are, bfloat16 is widened to float.
struct BFloat16 {
  uint16_t bits;
};

template <typename Stored>
struct Compute {
  using Type = Stored;
};
template <>
struct Compute<BFloat16> {
  using Type = float;
};
template <typename Stored>
using ComputeOf = typename Compute<Stored>::Type;

template <typename T>
inline Vec<T> load(const T* from) {
  Vec<T> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
inline Vec<float> load(const BFloat16* from) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  Narrow bits;
  std::memcpy(&bits, from, sizeof(bits));
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Wide) << 16);
}
template <typename T>
inline void store(T* to, Vec<T> value) {
  std::memcpy(to, &value, sizeof(value));
}

template <typename T>
inline T widen(T value) {
  return value;
}
inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
template <typename Stored>
inline Stored narrow(ComputeOf<Stored> value) {
  if constexpr (std::is_same_v<Stored, BFloat16>) {  // round to nearest even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return BFloat16{0x7FC0};
    return BFloat16{static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
  } else {
    return value;
  }
}

// Rounds to the storage type, as `narrow` does.
template <typename T>
inline void store_narrow(T* to, Vec<T> value) {
  store<T>(to, value);
}
inline void store_narrow(BFloat16* to, Vec<float> value) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  const Wide bits = reinterpret_cast<Wide>(value);
  const Wide rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Wide not_a_number = Wide{} + 0x7FC0;
  const Narrow result = __builtin_convertvector(value == value ? rounded : not_a_number, Narrow);
  std::memcpy(to, &result, sizeof(result));
}

struct Add {
  template <typename V>
  V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {
  template <typename V>
  V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

// One round of a transposing reduction: lanes with (lane & kHalf) == 0 go on reducing `low`, the others `high`.
template <int kHalf, typename T, typename Combine, int... lane>
inline Vec<T> fold(Vec<T> low, Vec<T> high, Combine combine, std::integer_sequence<int, lane...>) {
  constexpr int kCount = kLanes<T>;
  const Vec<T> kept = __builtin_shufflevector(low, high, ((lane & kHalf) ? lane + kCount : lane)...);
  const Vec<T> moved =
      __builtin_shufflevector(low, high, ((lane & kHalf) ? (lane ^ kHalf) + kCount : (lane ^ kHalf))...);
  return combine(kept, moved);
}
// Lane i of the result combines the lanes of rows[i]; `rows` is overwritten.
template <typename T, typename Combine, int kHalf = kLanes<T> / 2>
inline Vec<T> reduce_rows(Vec<T>* rows, Combine combine) {
  if constexpr (kHalf == 0) {
    return rows[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      rows[i] = fold<kHalf, T>(rows[i], rows[i + kHalf], combine, std::make_integer_sequence<int, kLanes<T>>{});
    }
    return reduce_rows<T, Combine, kHalf / 2>(rows, combine);
  }
}

template <int kHalf, typename T, int... lane>
inline void exchange(Vec<T>& low, Vec<T>& high, std::integer_sequence<int, lane...>) {
  const Vec<T> first = __builtin_shufflevector(low, high, ((lane & kHalf) ? (lane ^ kHalf) + kLanes<T> : lane)...);
  high = __builtin_shufflevector(low, high, ((lane & kHalf) ? lane + kLanes<T> : (lane ^ kHalf))...);
  low = first;
}
// Transposes the kRows x kRows blocks that lie side by side in kRows vectors; with as many rows as lanes, the matrix.
template <int kRows, typename T, int kHalf = kRows / 2>
inline void transpose(Vec<T>* rows) {
  if constexpr (kHalf > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      if ((i & kHalf) == 0) exchange<kHalf, T>(rows[i], rows[i + kHalf], std::make_integer_sequence<int, kLanes<T>>{});
    }
    transpose<kRows, T, kHalf / 2>(rows);
  }
}

// The first `count` elements, the other lanes zero.
template <typename Stored>
inline Vec<ComputeOf<Stored>> load_part(const Stored* from, int count) {
  if (count >= kLanes<ComputeOf<Stored>>) return load(from);
  Stored padded[kLanes<ComputeOf<Stored>>] = {};
  std::memcpy(padded, from, sizeof(Stored) * static_cast<std::size_t>(count));
  return load(static_cast<const Stored*>(padded));
}

// The first `count` elements, rounded to the storage type; what lies behind them stays.
template <typename Stored>
inline void store_part(Stored* to, Vec<ComputeOf<Stored>> value, int count) {
  if (count >= kLanes<ComputeOf<Stored>>) return store_narrow(to, value);
  for (int i = 0; i < count; ++i) to[i] = narrow<Stored>(value[i]);
}

template <typename T>
inline T sum_lanes(Vec<T> value) {
  T sum = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) sum += value[lane];
  return sum;
}

// exp(x) for x <= 88, within 1 ulp (Cephes' expf: exp(n ln 2 + r), polynomial in r); exactly 0 below -87.
inline Vec<float> exp_of(Vec<float> x) {
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  const float magic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
  const Vec<float> shifted = x * 1.44269504088896341F + magic;
  const Vec<float> n = shifted - magic;
  Vec<float> r = x - n * 0.693359375F;
  r = r - n * -2.12194440e-4F;
  Vec<float> p = r * 1.9875691500e-4F + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  const Ints power = (reinterpret_cast<Ints>(shifted) - 0x4B400000 + 127) << 23;
  const Vec<float> result = p * reinterpret_cast<Vec<float>>(power);
  return x < -87.0F ? Vec<float>{} : result;
}
inline Vec<double> exp_of(Vec<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

NPR_ISA_END
