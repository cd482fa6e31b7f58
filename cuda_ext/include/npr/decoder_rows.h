// The element-wise work between the matrix products of a decoder layer, one pass over each token's row.
#pragma once

#include <algorithm>
#include <cmath>

#include "npr/simd.h"

namespace npr {

constexpr int kMaxRotatedDim = 256;

// weight * x / sqrt(mean(x^2) + eps), Zhang and Sennrich 2019; `out` may be `x`.
template <typename In, typename Stored, typename Out>
inline void rms_norm_row(const In* x, const Stored* weight, Out* out, int64_t size, double eps) {
  using T = ComputeOf<Stored>;
  T squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; ++i) squares += widen(x[i]) * widen(x[i]);
  const T factor = T{1} / std::sqrt(squares / static_cast<T>(size) + static_cast<T>(eps));
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) out[i] = narrow<Out>(widen(x[i]) * factor * widen(weight[i]));
}

// silu(gate) * up (SwiGLU, Shazeer 2020) of one token's [gate | up].
template <typename Stored>
inline void silu_mul_row(const Stored* gate_up, Stored* out, int64_t size) {
  using T = ComputeOf<Stored>;
  constexpr int kCount = kLanes<T>;
  for (int64_t start = 0; start < size; start += kCount) {
    const int count = static_cast<int>(std::min<int64_t>(kCount, size - start));
    Vec<T> gate = {};
    Vec<T> up = {};
    if (count == kCount) {
      gate = load(gate_up + start);
      up = load(gate_up + size + start);
    } else {
      for (int i = 0; i < count; ++i) gate[i] = widen(gate_up[start + i]);
      for (int i = 0; i < count; ++i) up[i] = widen(gate_up[size + start + i]);
    }
    const Vec<T> negative = gate < T{-88} ? broadcast(T{88}) : -gate;  // exp_of takes at most 88
    const Vec<T> product = gate / (exp_of(negative) + T{1}) * up;
    for (int i = 0; i < count; ++i) out[start + i] = narrow<Stored>(product[i]);
  }
}

// One head of a token: normalised where `norm` is given, then turned by half rotation (dimension i with i + H/2).
template <typename Stored>
inline void norm_and_rotate_row(const Stored* x, const Stored* norm, const Stored* cos, const Stored* sin, Stored* out,
                                int head_dim, double eps) {
  using T = ComputeOf<Stored>;
  T row[kMaxRotatedDim];
  if (norm != nullptr) {
    rms_norm_row(x, norm, row, head_dim, eps);
  } else {
    for (int i = 0; i < head_dim; ++i) row[i] = widen(x[i]);
  }
  const int half = head_dim / 2;
#pragma omp simd
  for (int i = 0; i < half; ++i) {
    const T c = widen(cos[i]);
    const T s = widen(sin[i]);
    out[i] = narrow<Stored>(row[i] * c - row[half + i] * s);
    out[half + i] = narrow<Stored>(row[half + i] * c + row[i] * s);
  }
}

}  // namespace npr
