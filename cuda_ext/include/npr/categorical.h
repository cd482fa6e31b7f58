// Draws from softmax distributions by inverse CDF, one row of logits at a time; torch-free.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "npr/simd.h"

NPR_ISA_BEGIN

template <typename T>
struct Draw {
  int64_t index;
  T policy;   // log-probability at temperature 1; NaN where a logit is NaN
  T sampler;  // at the temperature that it was drawn with; 0 for the greedy choice
};

// A row of V logits, and scratch for its weights: what V + kBlock elements of T need, and a sum for each block.
template <typename Stored>
class LogitRow {
 public:
  using T = ComputeOf<Stored>;
  static constexpr int kBlockVectors = 32;
  static constexpr int64_t kBlock = int64_t{kBlockVectors} * kLanes<T>;

  explicit LogitRow(int64_t size) : size_(size), weights_(size + kBlock), block_sums_(size / kBlock + 1) {}

  // The greedy choice at temperature 0, otherwise the first index whose cumulative probability exceeds `uniform`.
  Draw<T> draw(const Stored* row, double uniform, T temperature) {
    const T maximum = highest(row);
    if (!(maximum < std::numeric_limits<T>::infinity())) return {0, std::numeric_limits<T>::quiet_NaN(), 0};
    if (temperature == 0) {
      return {index_of(row, maximum), static_cast<T>(-std::log(weigh<false>(row, maximum, 1))), 0};
    }
    const T sharpness = 1 / temperature;
    const double total = weigh<true>(row, maximum, sharpness);
    const int64_t index = first_beyond(uniform * total);
    const T above = load_part(row + index, 1)[0] - maximum;
    const auto sampler = static_cast<T>(above * sharpness - std::log(total));
    if (temperature == 1) return {index, sampler, sampler};
    return {index, static_cast<T>(above - std::log(weigh<false>(row, maximum, 1))), sampler};
  }

 private:
  // Largest logit; NaN where there is one.
  T highest(const Stored* row) const {
    constexpr T kLowest = -std::numeric_limits<T>::infinity();
    Vec<T> largest = Vec<T>{} + kLowest;
    Vec<T> poison{};  // NaN where a NaN was seen
    for (int64_t i = 0; i < size_; i += kLanes<T>) {
      const Vec<T> logits = part(row, i, kLowest);
      largest = logits > largest ? logits : largest;
      poison = logits == logits ? poison : logits;
    }
    T result = kLowest;
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      if (poison[lane] != poison[lane]) return poison[lane];
      result = std::max<T>(result, largest[lane]);
    }
    return result;
  }

  int64_t index_of(const Stored* row, T maximum) const {
    for (int64_t i = 0; i < size_; i += kLanes<T>) {
      const Vec<T> logits = load_part(row + i, static_cast<int>(std::min<int64_t>(kLanes<T>, size_ - i)));
      for (int64_t lane = 0; lane < std::min<int64_t>(kLanes<T>, size_ - i); ++lane) {
        if (logits[lane] == maximum) return i + lane;
      }
    }
    return 0;
  }

  // Sum of exp((row - maximum) * sharpness); kept by element and by block where the caller wants to draw.
  template <bool kKeep>
  double weigh(const Stored* row, T maximum, T sharpness) {
    double total = 0;
    for (int64_t begin = 0, block = 0; begin < size_; begin += kBlock, ++block) {
      Vec<T> sums{};
      const int64_t end = std::min(size_, begin + kBlock);
      for (int64_t i = begin; i < end; i += kLanes<T>) {
        const Vec<T> weight = exp_of((part(row, i, -std::numeric_limits<T>::infinity()) - maximum) * sharpness);
        if constexpr (kKeep) store<T>(weights_.data() + i, weight);
        sums += weight;
      }
      const double sum = sum_lanes<T>(sums);
      if constexpr (kKeep) block_sums_[static_cast<std::size_t>(block)] = sum;
      total += sum;
    }
    return total;
  }

  int64_t first_beyond(double target) const {
    double cumulative = 0;
    int64_t begin = 0;
    for (std::size_t block = 0; begin + kBlock < size_; begin += kBlock, ++block) {
      if (cumulative + block_sums_[block] > target) break;
      cumulative += block_sums_[block];
    }
    const int64_t last = std::min(size_, begin + kBlock) - 1;
    int64_t index = begin;
    for (; index < last; ++index) {
      cumulative += weights_[static_cast<std::size_t>(index)];
      if (cumulative > target) break;
    }
    // Rounding may leave a remainder: it never falls on a logit of -inf.
    while (index > 0 && weights_[static_cast<std::size_t>(index)] == 0) --index;
    return index;
  }

  // A vector of logits; `beyond` behind the row's end.
  Vec<T> part(const Stored* row, int64_t begin, T beyond) const {
    const int count = static_cast<int>(std::min<int64_t>(kLanes<T>, size_ - begin));
    Vec<T> logits = load_part(row + begin, count);
    for (int lane = count; lane < kLanes<T>; ++lane) logits[lane] = beyond;
    return logits;
  }

  int64_t size_;
  std::vector<T> weights_;
  std::vector<double> block_sums_;
};

NPR_ISA_END
