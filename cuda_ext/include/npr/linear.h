// x W^T for the rows of x that a decode step or a prefill chunk has. W is read from where it lies: a library's GEMM
// packs W at each call, which for few rows costs more than the product. Up to about a dozen rows the product waits for
// W to come from memory, so W is asked for in the order of its addresses, ahead of its use.
//
// Few rows: dot products. A register tile of kX x kW sums runs along the shared dimension C, reduced side by side at
// its end.
// More rows: x is transposed once into panels of up to 3 vectors of rows, [C][rows]; each element of W is then
// broadcast against the panel: kOutputs outputs x 3 vectors of rows.
#pragma once

#include <algorithm>
#include <bit>

#include "npr/products.h"

NPR_ISA_BEGIN

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

// Asks for the weights that come after a tile of outputs, a little with each of its steps, in the order of addresses:
// all of the next tile is under way before that begins.
template <typename Products>
class WeightsAhead {
 public:
  // `tile`: the first weight of a tile of `outputs` rows of `in_features`.
  WeightsAhead(const typename Products::Stored* tile, int outputs, int64_t in_features)
      : next_(reinterpret_cast<const char*>(tile + outputs * in_features) + kMargin) {}

  template <int kBytes>
  void advance() {
#pragma GCC unroll 16
    for (int at = 0; at < kBytes; at += kCacheLine) __builtin_prefetch(next_ + at);
    next_ += kBytes;
  }

 private:
  static constexpr int kCacheLine = 64;
  static constexpr int kMargin = 8192;  // some 200 ns of one core's reading
  const char* next_;
};

template <typename Products>
class DotLinear {
  using Stored = typename Products::Stored;
  using T = typename Products::Sum;
  static constexpr int kMostX = 5;
  static constexpr int kStep = kLanes<T> * Products::kPerLane;
  static constexpr int kStepBytes = kStep * static_cast<int>(sizeof(Stored));
  // Outputs of a tile of `num_x` rows: as the registers allow, but few rows of W at a time are read fastest (measured).
  static constexpr int tile_outputs(int num_x) {
    constexpr unsigned kSums = kVectorRegisters == 32 ? 24 : 8;
    constexpr unsigned kMostW = 8 / Products::kPerLane;
    return static_cast<int>(std::bit_floor(std::min(kSums / static_cast<unsigned>(num_x), kMostW)));
  }

 public:
  explicit DotLinear(const LinearJob<Stored>& job) : job_(job) {}

  // Outputs [begin, end) of every row; ranges may run at the same time.
  void run(int64_t begin, int64_t end) const {
    if (job_.rows == 0) return;
    const int64_t blocks = (job_.rows + kMostX - 1) / kMostX;
    const auto widest = (job_.rows + blocks - 1) / blocks;
    if (widest == 1) run_tiles<tile_outputs(1)>(blocks, begin, end);
    if (widest == 2) run_tiles<tile_outputs(2)>(blocks, begin, end);
    if (widest == 3) run_tiles<tile_outputs(3)>(blocks, begin, end);
    if (widest == 4) run_tiles<tile_outputs(4)>(blocks, begin, end);
    if (widest == 5) run_tiles<tile_outputs(5)>(blocks, begin, end);
  }

 private:
  // Blocks of rows of nearly equal height.
  template <int kW>
  void run_tiles(int64_t blocks, int64_t begin, int64_t end) const {
    for (int64_t d = begin; d < end; d += kW) {
      const int outputs = static_cast<int>(std::min<int64_t>(kW, end - d));
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t t = block * job_.rows / blocks;
        const int64_t rows = (block + 1) * job_.rows / blocks - t;
        if (rows == 1) tile<1, kW>(t, d, outputs);
        if (rows == 2) tile<2, kW>(t, d, outputs);
        if (rows == 3) tile<3, kW>(t, d, outputs);
        if (rows == 4) tile<4, kW>(t, d, outputs);
        if (rows == 5) tile<5, kW>(t, d, outputs);
      }
    }
  }

  // A tile at the edge computes its last output several times rather than branch in the inner loop.
  template <int kX, int kW>
  void tile(int64_t t, int64_t d, int outputs) const {
    constexpr int kSums = kX * kW;
    constexpr int kGroups = (kSums + kLanes<T> - 1) / kLanes<T>;
    const int64_t size = job_.in_features;
    const Stored* x = job_.x + t * size;
    const Stored* w[kW];
    for (int j = 0; j < kW; ++j) w[j] = job_.weight + (d + std::min(j, outputs - 1)) * size;
    WeightsAhead<Products> ahead(w[0], kW, size);
    Vec<T> sums[kGroups * kLanes<T>] = {};
    int64_t c = 0;
    for (; c + kStep <= size; c += kStep) {
      ahead.template advance<kW * kStepBytes>();
      Vec<T> xs[kX];
#pragma GCC unroll 8
      for (int i = 0; i < kX; ++i) xs[i] = in_register(Products::load(x + i * size + c));
#pragma GCC unroll 8
      for (int j = 0; j < kW; ++j) {
        const Vec<T> ws = in_register(Products::load(w[j] + c));
#pragma GCC unroll 8
        for (int i = 0; i < kX; ++i) sums[i * kW + j] = Products::add(sums[i * kW + j], xs[i], ws);
      }
    }
    if (c < size) {
      const int left = static_cast<int>(size - c);
      Vec<T> xs[kX];
      for (int i = 0; i < kX; ++i) xs[i] = Products::load_part(x + i * size + c, left);
      for (int j = 0; j < kW; ++j) {
        const Vec<T> ws = Products::load_part(w[j] + c, left);
#pragma GCC unroll 8
        for (int i = 0; i < kX; ++i) sums[i * kW + j] = Products::add(sums[i * kW + j], xs[i], ws);
      }
    }
    alignas(kVectorBytes) T totals[kGroups * kLanes<T>];
#pragma GCC unroll 4
    for (int group = 0; group < kGroups; ++group) {
      store<T>(totals + group * kLanes<T>, reduce_rows<T>(sums + group * kLanes<T>, Add{}));
    }
    for (int i = 0; i < kX; ++i) {
      Stored* to = job_.output + (t + i) * job_.out_features + d;
      for (int j = 0; j < outputs; ++j) {
        const T bias = job_.bias == nullptr ? T{} : widen(job_.bias[d + j]);
        to[j] = narrow<Stored>(totals[i * kW + j] + bias);
      }
    }
  }

  LinearJob<Stored> job_;
};

template <typename Products>
class PanelLinear {
  using Stored = typename Products::Stored;
  using T = typename Products::Sum;
  static constexpr int kPerLane = Products::kPerLane;
  static constexpr int kMaxVectors = 3;
  static constexpr int kUnroll = 4;
  // Steps that are summed in a row, and such sums: the rounding error grows with them. Adding up the parts costs
  // up to 3 % of the time; without it, the logits of a model with 1536 features inside have 2 to 10 times the error of
  // a library's GEMM.
  static constexpr int64_t kSummands = 16;

 public:
  static constexpr int kOutputs = std::max(1, kLanes<T> / 2);  // of a tile

  explicit PanelLinear(const LinearJob<Stored>& job)
      : job_(job),
        num_vectors_((job.rows + kLanes<T> - 1) / kLanes<T>),
        num_panels_((num_vectors_ + kMaxVectors - 1) / kMaxVectors),
        num_steps_((job.in_features + kPerLane - 1) / kPerLane) {}

  int64_t num_panels() const { return num_panels_; }
  // Elements of scratch that `pack` fills, aligned to vectors.
  int64_t scratch_size() const { return num_vectors_ * kLanes<T> * num_steps_; }

  // x of the rows of one panel, transposed; rows beyond the last are zero, as is the last pair's missing half.
  void pack(int64_t panel, T* scratch) const {
    const auto [first, vectors] = extent(panel);
    T* to = scratch + first * kLanes<T> * num_steps_;
    for (int64_t step = 0; step < num_steps_; step += kLanes<T>) {
      const int64_t c = step * kPerLane;
      const int columns = static_cast<int>(std::min<int64_t>(kLanes<T> * kPerLane, job_.in_features - c));
      const int steps = static_cast<int>(std::min<int64_t>(kLanes<T>, num_steps_ - step));
      for (int v = 0; v < vectors; ++v) {
        const int64_t t = (first + v) * kLanes<T>;
        Vec<T> block[kLanes<T>];
        for (int i = 0; i < kLanes<T>; ++i) {
          block[i] =
              t + i < job_.rows ? Products::load_part(job_.x + (t + i) * job_.in_features + c, columns) : Vec<T>{};
        }
        transpose<kLanes<T>, T>(block);
        for (int i = 0; i < steps; ++i) store<T>(to + ((step + i) * vectors + v) * kLanes<T>, block[i]);
      }
    }
  }

  // Outputs [begin, end) of every row, from packed x; ranges may run at the same time.
  void run(const T* scratch, int64_t begin, int64_t end) const {
    for (int64_t d = begin; d < end; d += kOutputs) {
      const int outputs = static_cast<int>(std::min<int64_t>(kOutputs, end - d));
      for (int64_t panel = 0; panel < num_panels_; ++panel) {
        const auto [first, vectors] = extent(panel);
        const T* x = scratch + first * kLanes<T> * num_steps_;
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
    // Few sums would wait for each other's latency: then every other step is summed apart.
    constexpr int kSplit = kVectors == 1 ? 2 : 1;
    constexpr int kVector = kVectors * kLanes<T>;
    const Stored* w[kOutputs];
    for (int j = 0; j < kOutputs; ++j) w[j] = job_.weight + (d + std::min(j, outputs - 1)) * job_.in_features;
    WeightsAhead<Products> ahead(w[0], kOutputs, job_.in_features);
    Vec<T> totals[kVectors][kOutputs];
    for (int j = 0; j < kOutputs; ++j) {
      const T bias = job_.bias == nullptr ? T{} : widen(job_.bias[d + std::min(j, outputs - 1)]);
      for (int v = 0; v < kVectors; ++v) totals[v][j] = broadcast(bias);
    }
    const int64_t whole_steps = job_.in_features / kPerLane;
    Vec<T> parts[kVectors][kOutputs] = {};
    for (int64_t step = 0; step < whole_steps;) {
      const int64_t end = std::min(step + kSummands, whole_steps);
      Vec<T> sums[kSplit][kVectors][kOutputs] = {};
      for (; step + kUnroll <= end; step += kUnroll) {
        ahead.template advance<kUnroll * kOutputs * kPerLane* static_cast<int>(sizeof(Stored))>();
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u) {
          add_step(x + (step + u) * kVector, w, (step + u) * kPerLane, sums[u % kSplit], Products::broadcast);
        }
      }
      for (; step < end; ++step) {
        add_step(x + step * kVector, w, step * kPerLane, sums[0], Products::broadcast);
      }
#pragma GCC unroll 2
      for (int part = 0; part < kSplit; ++part) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
          for (int j = 0; j < kOutputs; ++j) parts[v][j] += sums[part][v][j];
        }
      }
      if (end % (kSummands * kSummands) == 0 || end == whole_steps) {
        for (int v = 0; v < kVectors; ++v) {
          for (int j = 0; j < kOutputs; ++j) {
            totals[v][j] += parts[v][j];
            parts[v][j] = Vec<T>{};
          }
        }
      }
    }
    if (whole_steps < num_steps_) {
      add_step(x + whole_steps * kVector, w, whole_steps * kPerLane, totals, Products::broadcast_first);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) write(totals[v], t + v * kLanes<T>, d, outputs);
  }

  template <int kVectors, typename Broadcast>
  [[gnu::always_inline]] static void add_step(const T* x, const Stored* const (&w)[kOutputs], int64_t c,
                                              Vec<T> (&sums)[kVectors][kOutputs], Broadcast broadcast) {
    Vec<T> xs[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) xs[v] = load(x + v * kLanes<T>);
#pragma GCC unroll 16
    for (int j = 0; j < kOutputs; ++j) {
      const Vec<T> ws = broadcast(w[j] + c);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[v][j] = Products::add(sums[v][j], xs[v], ws);
    }
  }

  // sums[j] holds output d + j of a vector of rows.
  void write(Vec<T>* sums, int64_t t, int64_t d, int outputs) const {
    transpose<kOutputs, T>(sums);
    constexpr int kBlocks = kLanes<T> / kOutputs;
    const int64_t rows = std::min<int64_t>(kLanes<T>, job_.rows - t);
#pragma GCC unroll 16
    for (int i = 0; i < kOutputs; ++i) {
      Stored lanes[kLanes<T>];
      store_narrow(lanes, sums[i]);
#pragma GCC unroll 2
      for (int block = 0; block < kBlocks; ++block) {
        const int row = block * kOutputs + i;
        if (row >= rows) continue;
        Stored* to = job_.output + (t + row) * job_.out_features + d;
        const Stored* from = lanes + block * kOutputs;
        if (outputs == kOutputs) {
          std::memcpy(to, from, kOutputs * sizeof(Stored));
        } else {
          std::memcpy(to, from, static_cast<std::size_t>(outputs) * sizeof(Stored));
        }
      }
    }
  }

  LinearJob<Stored> job_;
  int64_t num_vectors_;
  int64_t num_panels_;
  int64_t num_steps_;  // elements of C, or pairs of them
};

NPR_ISA_END
