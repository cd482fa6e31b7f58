// x W^T for the rows of x that a decode step or a prefill chunk has. W is read from where it lies: a library's GEMM
// packs W at each call, which for few rows costs more than the product. Up to about a dozen rows the product waits for
// W to come from memory, so W is asked for in the order of its addresses, ahead of its use.
//
// Few rows: FewRowsLinear transposes W in registers. More rows: PanelLinear transposes x once into panels of up to 3
// vectors of rows, [C][rows], and broadcasts each element of W against the panel. An element of the result is the same
// to the bit in both: its products are summed in one order (OrderedSum).
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

// The order in which the products of an element are summed, the same for any number of rows and at any place among
// them: kSummands steps one after the other (a step: one product, or a pair), kSummands such sums, and these, behind
// the bias. In one chain the logits of a model with 1536 features inside would have 2 to 10 times the error of a
// library's GEMM.
constexpr int64_t kSummands = 16;

template <typename T, int kCount>
struct OrderedSum {
  Vec<T> sums[kCount] = {};
  Vec<T> parts[kCount] = {};
  Vec<T> totals[kCount];

  explicit OrderedSum(Vec<T> bias) {
    for (int i = 0; i < kCount; ++i) totals[i] = bias;
  }
  // After every kSummands steps; `steps`: how many there were so far.
  [[gnu::always_inline]] void end_summands(int64_t steps) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      parts[i] += sums[i];
      sums[i] = Vec<T>{};
    }
    if (steps % (kSummands * kSummands) == 0) end_parts();
  }
  // After the last step.
  void end_steps() {
    for (int i = 0; i < kCount; ++i) {
      parts[i] += sums[i];
      sums[i] = Vec<T>{};
    }
    end_parts();
  }

 private:
  [[gnu::always_inline]] void end_parts() {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      totals[i] += parts[i];
      parts[i] = Vec<T>{};
    }
  }
};

// Up to kMostRows rows. W is read where it lies, a block of kLanes outputs at a time, and transposed in registers: a
// lane is an output, and each element of x is broadcast against it. While W comes from memory the transposition costs
// nothing.
template <typename Products>
class FewRowsLinear {
  using Stored = typename Products::Stored;
  using T = typename Products::Sum;
  static constexpr int kPerLane = Products::kPerLane;
  static constexpr int kBlockSteps = Products::kBlockSteps;
  static_assert(kBlockSteps % kSummands == 0 || kSummands % kBlockSteps == 0);

 public:
  static constexpr int kOutputs = kLanes<T>;  // of a tile
  static constexpr int kMostRows = 6;

  explicit FewRowsLinear(const LinearJob<Stored>& job) : job_(job) {}

  // Outputs [begin, end) of every row; ranges may run at the same time.
  void run(int64_t begin, int64_t end) const {
    for (int64_t d = begin; d < end; d += kOutputs) {
      const int outputs = static_cast<int>(std::min<int64_t>(kOutputs, end - d));
      if (job_.rows == 1) tile<1>(d, outputs);
      if (job_.rows == 2) tile<2>(d, outputs);
      if (job_.rows == 3) tile<3>(d, outputs);
      if (job_.rows == 4) tile<4>(d, outputs);
      if (job_.rows == 5) tile<5>(d, outputs);
      if (job_.rows == 6) tile<6>(d, outputs);
    }
  }

 private:
  // A tile at the edge computes its last output several times rather than branch in the inner loop.
  template <int kX>
  void tile(int64_t d, int outputs) const {
    const int64_t size = job_.in_features;
    const int64_t whole_steps = size / kPerLane;
    const Stored* w[kOutputs];
    for (int j = 0; j < kOutputs; ++j) w[j] = job_.weight + (d + std::min(j, outputs - 1)) * size;
    WeightsAhead<Products> ahead(w[0], kOutputs, size);
    OrderedSum<T, kX> sum(job_.bias == nullptr ? Vec<T>{} : load_part(job_.bias + d, outputs));
    int64_t step = 0;
    for (; step + kBlockSteps <= whole_steps; step += kBlockSteps) {
      ahead.template advance<kBlockSteps * kOutputs * kPerLane* static_cast<int>(sizeof(Stored))>();
      Vec<T> block[kOutputs];
#pragma GCC unroll 16
      for (int j = 0; j < kOutputs; ++j) block[j] = Products::load_block(w[j] + step * kPerLane);
      transpose<kOutputs, T>(block);
#pragma GCC unroll 32
      for (int k = 0; k < kBlockSteps; ++k) {
        add_step<kX>(sum, (step + k) * kPerLane, Products::step_of(block, k), Products::broadcast);
        if ((k + 1) % kSummands == 0) sum.end_summands(step + k + 1);
      }
      if (kBlockSteps < kSummands && (step + kBlockSteps) % kSummands == 0) sum.end_summands(step + kBlockSteps);
    }
    if (step * kPerLane < size) {
      Vec<T> block[kOutputs];
      for (int j = 0; j < kOutputs; ++j) {
        block[j] = Products::load_block_part(w[j] + step * kPerLane, static_cast<int>(size - step * kPerLane));
      }
      transpose<kOutputs, T>(block);
      for (int k = 0; step + k < whole_steps; ++k) {
        add_step<kX>(sum, (step + k) * kPerLane, Products::step_of(block, k), Products::broadcast);
        if ((step + k + 1) % kSummands == 0) sum.end_summands(step + k + 1);
      }
      sum.end_steps();
      if (whole_steps * kPerLane < size) {
        const Vec<T> last = Products::step_of(block, static_cast<int>(whole_steps - step));
        for (int i = 0; i < kX; ++i) {
          const Vec<T> x = Products::broadcast_first(job_.x + i * size + whole_steps * kPerLane);
          sum.totals[i] = Products::add(sum.totals[i], x, last);
        }
      }
    } else {
      sum.end_steps();
    }
    for (int i = 0; i < kX; ++i) store_part(job_.output + i * job_.out_features + d, sum.totals[i], outputs);
  }

  template <int kX, typename Broadcast>
  [[gnu::always_inline]] void add_step(OrderedSum<T, kX>& sum, int64_t c, Vec<T> w, Broadcast broadcast) const {
#pragma GCC unroll 8
    for (int i = 0; i < kX; ++i)
      sum.sums[i] = Products::add(sum.sums[i], broadcast(job_.x + i * job_.in_features + c), w);
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

 public:
  static constexpr int kOutputs = std::max(1, kLanes<T> / 2);  // of a tile
  static constexpr int kMostRows = kMaxVectors * kLanes<T>;    // of a panel

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
    constexpr int kVector = kVectors * kLanes<T>;
    const Stored* w[kOutputs];
    for (int j = 0; j < kOutputs; ++j) w[j] = job_.weight + (d + std::min(j, outputs - 1)) * job_.in_features;
    WeightsAhead<Products> ahead(w[0], kOutputs, job_.in_features);
    Vec<T> totals[kVectors][kOutputs];
    for (int j = 0; j < kOutputs; ++j) {
      const T bias = job_.bias == nullptr ? T{} : widen(job_.bias[d + std::min(j, outputs - 1)]);
      for (int v = 0; v < kVectors; ++v) totals[v][j] = broadcast(bias);
    }
    // OrderedSum's order, spelt out: as members of a structure the compiler keeps the sums of 3 vectors in memory.
    const int64_t whole_steps = job_.in_features / kPerLane;
    Vec<T> parts[kVectors][kOutputs] = {};
    for (int64_t step = 0; step < whole_steps;) {
      const int64_t end = std::min(step + kSummands, whole_steps);
      Vec<T> sums[kVectors][kOutputs] = {};
      for (; step + kUnroll <= end; step += kUnroll) {
        ahead.template advance<kUnroll * kOutputs * kPerLane* static_cast<int>(sizeof(Stored))>();
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u) {
          add_step(x + (step + u) * kVector, w, (step + u) * kPerLane, sums, Products::broadcast);
        }
      }
      for (; step < end; ++step) {
        add_step(x + step * kVector, w, step * kPerLane, sums, Products::broadcast);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
        for (int j = 0; j < kOutputs; ++j) parts[v][j] += sums[v][j];
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
