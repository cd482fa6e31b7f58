// Small dense products and the running softmax on tiles that lie in cache: what all attention operators are made of.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <vector>

#include "npr/simd.h"
#include "npr/sizes.h"

NPR_ISA_BEGIN

static_assert(kTileKeys + kVectorBytes / 4 <= kTileStride && kMaxHeadDim <= kTileStride);

// Which part of a product is needed when query row r (token r / group) sees the keys up to its own token.
enum class Part {
  kAll,
  kColumnsToRow,   // C[r, key]: keys up to the row's token
  kReduceToRow,    // C[r, :] sums over keys up to the row's token
  kReduceFromRow,  // C[key, :] sums over rows from the key's token on
};

// Accumulator rows that fit the registers with `vectors` columns of vectors.
constexpr int micro_rows(int vectors) {
  const int budget = kVectorRegisters == 32 ? 24 : 12;
  return vectors == 1 ? budget / 2 : budget / vectors;
}

// Rows of B, contiguous or anywhere.
template <typename Stored>
struct StridedRows {
  const Stored* data;
  std::ptrdiff_t stride;
  const Stored* operator()(int k) const { return data + k * stride; }
};
template <typename Stored>
struct OffsetRows {
  const Stored* data;
  const std::ptrdiff_t* offsets;
  const Stored* operator()(int k) const { return data + offsets[k]; }
};

// C[rows, kVectors * lanes] (+)= A[rows, k_begin..k_end) B, with element (m, k) of A at a[m * kRowStep + k *
// kReduceStep].
template <typename T, int kRows, int kVectors, int kRowStep, int kReduceStep, bool kAccumulate, typename Rows>
void multiply_micro(int k_begin, int k_end, const T* a, Rows b, int column, T* c, std::ptrdiff_t c_stride) {
  // Few sums would wait for each other's latency: then several steps of the reduction are summed apart.
  constexpr int kSplit = kRows * kVectors >= 8 ? 1 : (kRows * kVectors >= 4 ? 2 : 4);
  Vec<T> sums[kSplit][kRows][kVectors] = {};
  const auto add = [&](int k, Vec<T>(&into)[kRows][kVectors]) {
    const auto* b_row = b(k) + column;
    Vec<T> b_values[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b_values[v] = load(b_row + v * kLanes<T>);
#pragma GCC unroll 32
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> a_value = broadcast<T>(a[m * kRowStep + static_cast<std::ptrdiff_t>(k) * kReduceStep]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) into[m][v] += a_value * b_values[v];
    }
  };
  int k = k_begin;
  for (; k + kSplit <= k_end; k += kSplit) {
#pragma GCC unroll 4
    for (int part = 0; part < kSplit; ++part) add(k + part, sums[part]);
  }
  for (; k < k_end; ++k) add(k, sums[0]);
#pragma GCC unroll 32
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {  // a tile is summed by itself first: shorter chains of rounding errors
      Vec<T> sum = sums[0][m][v];
#pragma GCC unroll 4
      for (int part = 1; part < kSplit; ++part) sum += sums[part][m][v];
      T* to = c + m * c_stride + v * kLanes<T>;
      store<T>(to, kAccumulate ? load(to) + sum : sum);
    }
  }
}

template <typename T, int kVectors, int kRowStep, int kReduceStep, bool kAccumulate, typename Rows>
struct MicroTable {
  using Function = void (*)(int, int, const T*, Rows, int, T*, std::ptrdiff_t);
  template <int... row>
  static constexpr std::array<Function, sizeof...(row)> make(std::integer_sequence<int, row...>) {
    return {&multiply_micro<T, row + 1, kVectors, kRowStep, kReduceStep, kAccumulate, Rows>...};
  }
  static constexpr int kRows = micro_rows(kVectors);
  static constexpr auto kFunctions = make(std::make_integer_sequence<int, kRows>{});
};

template <typename T, int kVectors, int kRowStep, int kReduceStep, bool kAccumulate, Part kPart, typename Rows>
void multiply_columns(int rows, int reduce, int group, const T* a, Rows b, int column, T* c, std::ptrdiff_t c_stride) {
  using Table = MicroTable<T, kVectors, kRowStep, kReduceStep, kAccumulate, Rows>;
  const int chunks = (rows + Table::kRows - 1) / Table::kRows;
  for (int chunk = 0, begin = 0; chunk < chunks; ++chunk) {
    const int end = begin + (rows - begin) / (chunks - chunk);  // chunks of equal height keep the registers busy
    int k_begin = 0;
    int k_end = reduce;
    if constexpr (kPart == Part::kColumnsToRow) {
      if (column > (end - 1) / group) {
        begin = end;
        continue;
      }
    } else if constexpr (kPart == Part::kReduceToRow) {
      k_end = std::min(reduce, (end - 1) / group + 1);
    } else if constexpr (kPart == Part::kReduceFromRow) {
      k_begin = std::min(reduce, begin * group);
    }
    Table::kFunctions[end - begin - 1](k_begin, k_end, a + begin * kRowStep, b, column, c + begin * c_stride + column,
                                       c_stride);
    begin = end;
  }
}

// C[rows, columns] (+)= A[rows, reduce] B[reduce, columns]; columns are rounded up to whole vectors.
template <typename T, int kRowStep, int kReduceStep, bool kAccumulate, Part kPart = Part::kAll, typename Rows>
void multiply(int rows, int columns, int reduce, const T* a, Rows b, T* c, std::ptrdiff_t c_stride, int group = 1) {
  int vectors = (columns + kLanes<T> - 1) / kLanes<T>;
  int column = 0;
  for (; vectors >= 4; vectors -= 4, column += 4 * kLanes<T>) {
    multiply_columns<T, 4, kRowStep, kReduceStep, kAccumulate, kPart>(rows, reduce, group, a, b, column, c, c_stride);
  }
  if (vectors == 3) {
    multiply_columns<T, 3, kRowStep, kReduceStep, kAccumulate, kPart>(rows, reduce, group, a, b, column, c, c_stride);
  } else if (vectors == 2) {
    multiply_columns<T, 2, kRowStep, kReduceStep, kAccumulate, kPart>(rows, reduce, group, a, b, column, c, c_stride);
  } else if (vectors == 1) {
    multiply_columns<T, 1, kRowStep, kReduceStep, kAccumulate, kPart>(rows, reduce, group, a, b, column, c, c_stride);
  }
}

// Scratch tile in memory that is aligned to cache lines.
template <typename T>
class Tile {
 public:
  explicit Tile(int rows) : storage_(static_cast<std::size_t>(rows) * kTileStride + kVectorBytes) {
    const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    data_ = reinterpret_cast<T*>((address + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
  }
  Tile(const Tile&) = delete;
  Tile& operator=(const Tile&) = delete;
  T* row(int index) { return data_ + static_cast<std::ptrdiff_t>(index) * kTileStride; }
  // The first `columns` of each row, in whole vectors.
  void clear(int rows, int columns) {
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < columns; i += kLanes<T>) store<T>(row(r) + i, Vec<T>{});
    }
  }

 private:
  std::vector<T> storage_;
  T* data_;
};

// Softmax of rows whose scores arrive in pieces.
template <typename T>
class RunningSoftmax {
 public:
  void start(int rows) {
    std::fill_n(maximum_, rows + kLanes<T>, -std::numeric_limits<T>::infinity());
    std::fill_n(total_, rows + kLanes<T>, T(0));
  }

  T total(int row) const { return total_[row]; }
  T log_sum(int row) const { return maximum_[row] + std::log(total_[row]); }

  // Scores become exp(score - maximum so far), zero from limit_of(row) to `columns`; `output`, the sum of weighted
  // values so far, is rescaled. Rows [begin, end) are taken a vector at a time, so that maxima and sums are reduced
  // side by side; the lanes beyond `end` keep what they have.
  template <typename LimitOf>
  void absorb(Tile<T>& scores, int begin, int end, int columns, const LimitOf& limit_of, Tile<T>& output, int dim) {
    for (int first = begin; first < end; first += kLanes<T>) {
      const int count = std::min(kLanes<T>, end - first);
      Vec<T> reduced[kLanes<T>];
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        reduced[lane] =
            lane < count ? row_maximum(scores.row(first + lane), limit_of(first + lane)) : broadcast<T>(kMinusInfinity);
      }
      const Vec<T> before = load(maximum_ + first);
      const Vec<T> maximum = Max{}(reduce_rows<T>(reduced, Max{}), before);
      const Vec<T> shift = maximum == kMinusInfinity ? Vec<T>{} : maximum;
      const Vec<T> decay = exp_of(before - shift);
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        reduced[lane] = lane < count
                            ? exponentiate(scores.row(first + lane), limit_of(first + lane), columns, shift[lane])
                            : Vec<T>{};
      }
      store<T>(total_ + first, load(total_ + first) * decay + reduce_rows<T>(reduced, Add{}));
      store<T>(maximum_ + first, maximum);
      for (int lane = 0; lane < count; ++lane) {
        if (decay[lane] != T(1)) scale(output.row(first + lane), dim, decay[lane]);
      }
    }
  }

 private:
  static constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

  static Vec<T> row_maximum(T* scores, int limit) {
    const int padded = round_up_to_lanes<T>(limit);
    for (int j = limit; j < padded; ++j) scores[j] = kMinusInfinity;
    Vec<T> highest = broadcast<T>(kMinusInfinity);
    for (int j = 0; j < padded; j += kLanes<T>) highest = Max{}(load(scores + j), highest);
    return highest;
  }

  static Vec<T> exponentiate(T* scores, int limit, int columns, T shift) {
    const int padded = round_up_to_lanes<T>(limit);
    Vec<T> sum{};
    for (int j = 0; j < padded; j += kLanes<T>) {
      const Vec<T> weight = exp_of(load(scores + j) - broadcast<T>(shift));
      store<T>(scores + j, weight);
      sum += weight;
    }
    for (int j = padded; j < columns; ++j) scores[j] = 0;
    return sum;
  }

  static void scale(T* row, int dim, T factor) {
    for (int i = 0; i < dim; i += kLanes<T>) store<T>(row + i, load(row + i) * broadcast<T>(factor));
  }

  T maximum_[kTileRows + kLanes<T>];
  T total_[kTileRows + kLanes<T>];
};

NPR_ISA_END
