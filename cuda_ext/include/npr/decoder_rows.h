// The element-wise work between the matrix products of a decoder layer, one pass over each token's row.
#pragma once

#include <algorithm>
#include <cmath>

#include "npr/simd.h"
#include "npr/sizes.h"

NPR_ISA_BEGIN

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

// Gradients of rms_norm_row from that of its output: of x, and added to `weight_gradient`, of the weight.
template <typename Stored>
inline void rms_norm_backward_row(const Stored* x, const Stored* weight, const Stored* gradient, Stored* x_gradient,
                                  ComputeOf<Stored>* weight_gradient, int64_t size, double eps) {
  using T = ComputeOf<Stored>;
  T squares = 0;
  T along = 0;  // of the weighted gradient, along x
#pragma omp simd reduction(+ : squares, along)
  for (int64_t i = 0; i < size; ++i) {
    squares += widen(x[i]) * widen(x[i]);
    along += widen(x[i]) * widen(weight[i]) * widen(gradient[i]);
  }
  const T mean = squares / static_cast<T>(size) + static_cast<T>(eps);
  const T factor = T{1} / std::sqrt(mean);
  const T part = along / (static_cast<T>(size) * mean);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const T normed = widen(x[i]) * factor;
    weight_gradient[i] += normed * widen(gradient[i]);
    x_gradient[i] = narrow<Stored>(factor * (widen(weight[i]) * widen(gradient[i]) - widen(x[i]) * part));
  }
}

template <typename T>
inline Vec<T> sigmoid_of(Vec<T> x) {
  const Vec<T> negative = x < T{-88} ? broadcast(T{88}) : -x;  // exp_of takes at most 88
  return T{1} / (exp_of(negative) + T{1});
}

// silu(gate) * up (SwiGLU, Shazeer 2020) of one token's [gate | up].
template <typename Stored>
inline void silu_mul_row(const Stored* gate_up, Stored* out, int64_t size) {
  using T = ComputeOf<Stored>;
  constexpr int kCount = kLanes<T>;
  for (int64_t start = 0; start < size; start += kCount) {
    const int count = static_cast<int>(std::min<int64_t>(kCount, size - start));
    const Vec<T> gate = load_part(gate_up + start, count);
    const Vec<T> up = load_part(gate_up + size + start, count);
    store_part(out + start, gate * sigmoid_of<T>(gate) * up, count);
  }
}

// Gradient of silu_mul_row's [gate | up] from that of its output.
template <typename Stored>
inline void silu_mul_backward_row(const Stored* gate_up, const Stored* gradient, Stored* out, int64_t size) {
  using T = ComputeOf<Stored>;
  constexpr int kCount = kLanes<T>;
  for (int64_t start = 0; start < size; start += kCount) {
    const int count = static_cast<int>(std::min<int64_t>(kCount, size - start));
    const Vec<T> gate = load_part(gate_up + start, count);
    const Vec<T> up = load_part(gate_up + size + start, count);
    const Vec<T> given = load_part(gradient + start, count);
    const Vec<T> sigmoid = sigmoid_of<T>(gate);
    store_part(out + start, given * up * sigmoid * (T{1} + gate * (T{1} - sigmoid)), count);
    store_part(out + size + start, given * gate * sigmoid, count);
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

NPR_ISA_END
