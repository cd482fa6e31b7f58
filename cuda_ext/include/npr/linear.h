// x W^T for the rows of x that a decode step or a prefill chunk has. W is read from where it lies: a library's GEMM
// packs W at each call, which for few rows costs more than the product.
//
// Few rows: dot products. A register tile of kDotX x kDotW sums runs along the shared dimension C; it has as many sums
// as a vector has lanes, so that one transposing reduction leaves them in one vector.
// More rows: x is transposed once into panels of up to 3 vectors of rows, [C][rows]; each element of W is then
// broadcast against the panel: kTileW outputs x 3 vectors of rows.
#pragma once

#include <algorithm>

#include "npr/simd.h"

namespace npr {

template <typename Stored>
struct LinearJob {
  const Stored* x;       // [T, C]
  const Stored* weight;  // [D, C]
  const Stored* bias;    // [D] or null
  Stored* output;        // [T, D]
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
};

template <typename Stored>
class DotLinear {
  using T = ComputeOf<Stored>;
  static constexpr int kDotX = kLanes<T> >= 8 ? 4 : (kLanes<T> >= 4 ? 2 : 1);
  static constexpr int kDotW = kLanes<T> / kDotX;
  static constexpr int kPrefetchBytes = 2048;

 public:
  explicit DotLinear(const LinearJob<Stored>& job) : job_(job) {}

  // Outputs [begin, end) of every row; ranges may run at the same time.
  void run(int64_t begin, int64_t end) const {
    for (int64_t d = begin; d < end; d += kDotW) {
      for (int64_t t = 0; t < job_.rows; t += kDotX) {
        tile(t, static_cast<int>(std::min<int64_t>(kDotX, job_.rows - t)), d,
             static_cast<int>(std::min<int64_t>(kDotW, end - d)));
      }
    }
  }

 private:
  // A tile at the edge computes its last row several times rather than branch in the inner loop.
  void tile(int64_t t, int num_x, int64_t d, int num_w) const {
    const int64_t size = job_.in_features;
    const Stored* x[kDotX];
    const Stored* w[kDotW];
    for (int i = 0; i < kDotX; ++i) x[i] = job_.x + (t + std::min(i, num_x - 1)) * size;
    for (int j = 0; j < kDotW; ++j) w[j] = job_.weight + (d + std::min(j, num_w - 1)) * size;
    Vec<T> sums[kLanes<T>] = {};
    int64_t c = 0;
    for (; c + kLanes<T> <= size; c += kLanes<T>) {
      Vec<T> xs[kDotX];
#pragma GCC unroll 8
      for (int i = 0; i < kDotX; ++i) xs[i] = load(x[i] + c);
#pragma GCC unroll 8
      for (int j = 0; j < kDotW; ++j) {
        const Vec<T> ws = load(w[j] + c);
        if (t == 0) __builtin_prefetch(reinterpret_cast<const char*>(w[j] + c) + kPrefetchBytes);
#pragma GCC unroll 8
        for (int i = 0; i < kDotX; ++i) sums[i * kDotW + j] += xs[i] * ws;
      }
    }
    Vec<T> total = reduce_rows<T>(sums, Add{});
    for (; c < size; ++c) {
      for (int i = 0; i < kDotX; ++i) {
        for (int j = 0; j < kDotW; ++j) total[i * kDotW + j] += widen(x[i][c]) * widen(w[j][c]);
      }
    }
    for (int i = 0; i < num_x; ++i) {
      for (int j = 0; j < num_w; ++j) {
        const T bias = job_.bias == nullptr ? T{} : widen(job_.bias[d + j]);
        job_.output[(t + i) * job_.out_features + d + j] = narrow<Stored>(total[i * kDotW + j] + bias);
      }
    }
  }

  LinearJob<Stored> job_;
};

template <typename Stored>
class PanelLinear {
  using T = ComputeOf<Stored>;
  static constexpr int kMaxVectors = 3;
  // Products that are summed in a row: the rounding error grows with them. Adding up the parts costs 1 to 2 % of the
  // time; without it, the logits of a model with 1536 features inside have 2 to 10 times the error of a library's GEMM.
  static constexpr int64_t kSummands = 64;

 public:
  static constexpr int kTileW = std::max(1, kLanes<T> / 2);

  explicit PanelLinear(const LinearJob<Stored>& job)
      : job_(job),
        num_vectors_((job.rows + kLanes<T> - 1) / kLanes<T>),
        num_panels_((num_vectors_ + kMaxVectors - 1) / kMaxVectors) {}

  int64_t num_panels() const { return num_panels_; }
  // Elements of scratch that `pack` fills, aligned to vectors.
  int64_t scratch_size() const { return num_vectors_ * kLanes<T> * job_.in_features; }

  // x of the rows of one panel, transposed; rows beyond the last are zero.
  void pack(int64_t panel, T* scratch) const {
    const auto [first, vectors] = extent(panel);
    T* to = scratch + first * kLanes<T> * job_.in_features;
    for (int64_t c = 0; c < job_.in_features; c += kLanes<T>) {
      const int columns = static_cast<int>(std::min<int64_t>(kLanes<T>, job_.in_features - c));
      for (int v = 0; v < vectors; ++v) {
        const int64_t t = (first + v) * kLanes<T>;
        Vec<T> block[kLanes<T>];
        for (int i = 0; i < kLanes<T>; ++i) {
          block[i] = t + i < job_.rows ? load_part(job_.x + (t + i) * job_.in_features + c, columns) : Vec<T>{};
        }
        transpose<kLanes<T>, T>(block);
        for (int i = 0; i < columns; ++i) store<T>(to + ((c + i) * vectors + v) * kLanes<T>, block[i]);
      }
    }
  }

  // Outputs [begin, end) of every row, from packed x; ranges may run at the same time.
  void run(const T* scratch, int64_t begin, int64_t end) const {
    for (int64_t d = begin; d < end; d += kTileW) {
      const int outputs = static_cast<int>(std::min<int64_t>(kTileW, end - d));
      for (int64_t panel = 0; panel < num_panels_; ++panel) {
        const auto [first, vectors] = extent(panel);
        const T* x = scratch + first * kLanes<T> * job_.in_features;
        const int64_t t = first * kLanes<T>;
        if (vectors == 1) tile<1>(x, t, d, outputs);
        if (vectors == 2) tile<2>(x, t, d, outputs);
        if (vectors == 3) tile<3>(x, t, d, outputs);
      }
    }
  }

 private:
  struct Extent {
    int64_t first;  // vector of rows
    int vectors;
  };
  // Panels of nearly equal width.
  Extent extent(int64_t panel) const {
    const int64_t first = panel * num_vectors_ / num_panels_;
    return {first, static_cast<int>((panel + 1) * num_vectors_ / num_panels_ - first)};
  }

  template <int kVectors>
  void tile(const T* x, int64_t t, int64_t d, int outputs) const {
    const Stored* w[kTileW];
    for (int j = 0; j < kTileW; ++j) w[j] = job_.weight + (d + std::min(j, outputs - 1)) * job_.in_features;
    Vec<T> totals[kVectors][kTileW];
    for (int j = 0; j < kTileW; ++j) {
      const T bias = job_.bias == nullptr ? T{} : widen(job_.bias[d + std::min(j, outputs - 1)]);
      for (int v = 0; v < kVectors; ++v) totals[v][j] = broadcast(bias);
    }
    for (int64_t begin = 0; begin < job_.in_features; begin += kSummands) {
      const int64_t end = std::min(begin + kSummands, job_.in_features);
      Vec<T> sums[kVectors][kTileW] = {};
      for (int64_t c = begin; c < end; ++c) {
        Vec<T> xs[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) xs[v] = load(x + (c * kVectors + v) * kLanes<T>);
#pragma GCC unroll 8
        for (int j = 0; j < kTileW; ++j) {
          const Vec<T> ws = broadcast<T>(widen(w[j][c]));
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sums[v][j] += xs[v] * ws;
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        for (int j = 0; j < kTileW; ++j) totals[v][j] += sums[v][j];
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) write(totals[v], t + v * kLanes<T>, d, outputs);
  }

  // sums[j] holds output d + j of a vector of rows.
  void write(Vec<T>* sums, int64_t t, int64_t d, int outputs) const {
    transpose<kTileW, T>(sums);
    constexpr int kBlocks = kLanes<T> / kTileW;
    const int64_t rows = std::min<int64_t>(kLanes<T>, job_.rows - t);
#pragma GCC unroll 8
    for (int i = 0; i < kTileW; ++i) {
      T lanes[kLanes<T>];
      store<T>(lanes, sums[i]);
#pragma GCC unroll 2
      for (int block = 0; block < kBlocks; ++block) {
        const int row = block * kTileW + i;
        if (row >= rows) continue;
        Stored* to = job_.output + (t + row) * job_.out_features + d;
        if (outputs == kTileW) {
#pragma GCC unroll 8
          for (int j = 0; j < kTileW; ++j) to[j] = narrow<Stored>(lanes[block * kTileW + j]);
        } else {
          for (int j = 0; j < outputs; ++j) to[j] = narrow<Stored>(lanes[block * kTileW + j]);
        }
      }
    }
  }

  LinearJob<Stored> job_;
  int64_t num_vectors_;
  int64_t num_panels_;
};

}  // namespace npr
