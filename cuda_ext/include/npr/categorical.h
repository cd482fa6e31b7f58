// Draws from softmax distributions by inverse CDF, one row of scores at a time.
#pragma once

#include <algorithm>
#include <cmath>

#include "npr/simd.h"

namespace npr {

template <typename T>
struct Draw {
  int64_t index;
  T logprob;  // NaN where a score is NaN
};

// Largest element; NaN where there is one.
template <typename T>
inline T row_maximum(const T* row, int64_t size) {
  T highest = -std::numeric_limits<T>::infinity();
  bool invalid = false;
#pragma omp simd reduction(max : highest) reduction(| : invalid)
  for (int64_t i = 0; i < size; ++i) {
    highest = std::max(highest, row[i]);
    invalid |= row[i] != row[i];
  }
  return invalid ? std::numeric_limits<T>::quiet_NaN() : highest;
}

// exp(row - maximum) to `weights`, whose size is rounded up to whole vectors; returns their sum in double.
template <typename T>
inline double exponentials(const T* row, int64_t size, T maximum, T* weights) {
  double total = 0;
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes<T>, size - i));
    Vec<T> shifted = load_part(row + i, count) - maximum;
    for (int lane = count; lane < kLanes<T>; ++lane) shifted[lane] = -std::numeric_limits<T>::infinity();
    const Vec<T> weight = exp_of(shifted);
    store<T>(weights + i, weight);
    total += sum_lanes<T>(weight);
  }
  return total;
}

// The first index whose cumulative probability exceeds `uniform`. `weights` is scratch for size + a vector.
template <typename T>
inline Draw<T> draw(const T* row, int64_t size, double uniform, T* weights) {
  const T maximum = row_maximum(row, size);
  const double total = exponentials(row, size, maximum, weights);
  const double target = uniform * total;
  double cumulative = 0;
  int64_t start = 0;
  for (; start + kLanes<T> < size; start += kLanes<T>) {
    const double block = sum_lanes<T>(load(weights + start));
    if (cumulative + block > target) break;
    cumulative += block;
  }
  const int64_t last = std::min<int64_t>(size, start + kLanes<T>) - 1;
  int64_t index = start;
  for (; index < last; ++index) {
    cumulative += weights[index];
    if (cumulative > target) break;
  }
  while (index > 0 && weights[index] == 0) --index;  // rounding left a remainder: never a score of -inf
  return {index, static_cast<T>(row[index] - maximum - std::log(total))};
}

}  // namespace npr
