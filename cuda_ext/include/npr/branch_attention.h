// Branch attention, forward and backward, over the rectangles and triangles of an attention plan. Torch-free.
//
// Rows of a tile are the queries of up to kTileRows / group tokens of one unit, times the query heads that share a key
// head. A hidden key is never read for a row, so it cannot influence it. Backward accumulates keys and values in task
// order only: the split into tasks depends on the layout and the heads, never on threads, so gradients are
// reproducible.
#pragma once

#include <cmath>
#include <cstdint>

#include "npr/attention_schedule.h"
#include "npr/tile.h"

NPR_ISA_BEGIN

// [T, heads, dim] with dim contiguous.
template <typename T>
struct HeadTensor {
  T* data;
  std::ptrdiff_t token_stride;
  std::ptrdiff_t head_stride;
  T* row(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

// Keys [begin, end) inside one packed block; rows see all of them, or those up to their own token.
struct KeyPiece {
  int32_t begin;
  int32_t end;
  bool causal;
};

template <typename T>
struct BranchAttention {
  AttentionPlan plan;
  Schedule schedule;
  HeadTensor<const T> q;  // [Q, N, H]: queries are the last Q of the T tokens
  HeadTensor<const T> k;  // [T, K, H]
  HeadTensor<const T> v;
  HeadTensor<T> output;  // [Q, N, H]
  T* log_sums;           // [Q, N]
  T* packed_keys;        // [K, blocks, H, kTileStride]: key blocks, transposed
  int64_t num_tokens;
  int group;
  int num_kv_heads;
  int dim;
  T scale;

  int num_heads() const { return group * num_kv_heads; }
  int64_t num_blocks() const { return (num_tokens + kTileKeys - 1) / kTileKeys; }
  std::ptrdiff_t packed_offset(int64_t block, int kv_head) const {
    return (kv_head * num_blocks() + block) * dim * kTileStride;
  }
};

template <typename T>
struct BranchAttentionGradient {
  HeadTensor<const T> output;  // gradient of it
  HeadTensor<T> q;
  HeadTensor<T> k;
  HeadTensor<T> v;
  T* packed_values;  // as packed_keys
  T* scratch_k;      // [scratch tokens, K, H]
  T* scratch_v;
};

// One block of keys or values, transposed to [dim, keys].
template <typename T>
void pack_block(const HeadTensor<const T>& from, int64_t block, int kv_head, int64_t num_tokens, int dim, T* to) {
  const int64_t first = block * kTileKeys;
  const int count = static_cast<int>(std::min<int64_t>(kTileKeys, num_tokens - first));
  for (int i = 0; i < dim; ++i) std::fill(to + i * kTileStride + count, to + (i + 1) * kTileStride, T(0));
  constexpr int kStep = 16;  // keys and dimensions at a time: whole cache lines on both sides
  for (int j0 = 0; j0 < count; j0 += kStep) {
    const int j1 = std::min(count, j0 + kStep);
    for (int i0 = 0; i0 < dim; i0 += kStep) {
      for (int j = j0; j < j1; ++j) {
        const T* row = from.row(first + j, kv_head) + i0;
        for (int i = 0; i < kStep; ++i) to[(i0 + i) * kTileStride + j] = row[i];
      }
    }
  }
}

// Calls use(piece) for all keys that the tile's rows see, in order.
template <typename Use>
void for_each_piece(const AttentionPlan& plan, const QueryTile& tile, const Use& use) {
  const auto split = [&](int32_t begin, int32_t end) {
    while (begin < end) {
      const int32_t next = std::min(end, (begin / kTileKeys + 1) * kTileKeys);
      use(KeyPiece{begin, next, false});
      begin = next;
    }
  };
  const Unit& unit = plan.units[tile.unit];
  const std::size_t next_unit = tile.unit + 1;
  const std::size_t end = next_unit < plan.units.size() ? plan.units[next_unit].first_interval : plan.intervals.size();
  int32_t own_begin = unit.begin;
  for (std::size_t i = unit.first_interval; i < end; ++i) {
    const Interval& interval = plan.intervals[i];
    if (interval.end == unit.begin) {
      own_begin = interval.begin;
    } else {
      split(interval.begin, interval.end);
    }
  }
  split(own_begin, tile.begin);
  use(KeyPiece{tile.begin, tile.end, true});
}

template <typename T>
class BranchAttentionTask {
 public:
  BranchAttentionTask()
      : query_(kTileRows), scores_(kTileRows), output_(kTileRows), gradient_(kTileRows), weights_(kTileRows) {}

  void forward(const BranchAttention<T>& job, const TileRange& range, int kv_head) {
    for (int32_t index = range.first_tile; index < range.end_tile; ++index) {
      forward_tile(job, job.schedule.tiles[index], kv_head);
    }
  }

  void backward(const BranchAttention<T>& job, const BranchAttentionGradient<T>& gradient, const TileRange& range,
                int kv_head) {
    HeadTensor<T> dk = gradient.k;
    HeadTensor<T> dv = gradient.v;
    if (range.scratch_token >= 0) {
      const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(job.num_kv_heads) * job.dim;
      const std::ptrdiff_t offset = (range.scratch_token - range.first_token) * stride;
      dk = {gradient.scratch_k + offset, stride, job.dim};
      dv = {gradient.scratch_v + offset, stride, job.dim};
    }
    for (int32_t t = range.first_token; t < range.end_token; ++t) {
      std::fill_n(dk.row(t, kv_head), job.dim, T(0));
      std::fill_n(dv.row(t, kv_head), job.dim, T(0));
    }
    for (int32_t index = range.first_tile; index < range.end_tile; ++index) {
      backward_tile(job, gradient, job.schedule.tiles[index], kv_head, dk, dv);
    }
  }

 private:
  void load_rows(const HeadTensor<const T>& from, const BranchAttention<T>& job, const QueryTile& tile, int kv_head,
                 T factor, Tile<T>& to) {
    for_each_row(job, tile, kv_head, [&](int r, int64_t query, int head) {
      const T* row = from.row(query, head);
      for (int i = 0; i < job.dim; ++i) to.row(r)[i] = row[i] * factor;
    });
  }

  // Calls use(row of the tile, query, head); queries count from the first one.
  template <typename Use>
  static void for_each_row(const BranchAttention<T>& job, const QueryTile& tile, int kv_head, const Use& use) {
    int r = 0;
    for (int32_t t = tile.begin; t < tile.end; ++t) {
      for (int g = 0; g < job.group; ++g, ++r) use(r, t - job.plan.first_query, kv_head * job.group + g);
    }
  }

  static StridedRows<T> packed(const T* blocks, const BranchAttention<T>& job, int kv_head, int32_t key) {
    return {blocks + job.packed_offset(key / kTileKeys, kv_head) + key % kTileKeys, kTileStride};
  }
  static StridedRows<T> natural(const HeadTensor<const T>& from, int kv_head, int32_t key) {
    return {from.row(key, kv_head), from.token_stride};
  }

  // scores[rows, keys] = left[rows, dim] x packed^T
  void dot_products(Tile<T>& left, StridedRows<T> right, int rows, int keys, int dim, int group, bool causal,
                    Tile<T>& scores) {
    if (causal) {
      multiply<T, kTileStride, 1, false, Part::kColumnsToRow>(rows, keys, dim, left.row(0), right, scores.row(0),
                                                              kTileStride, group);
    } else {
      multiply<T, kTileStride, 1, false>(rows, keys, dim, left.row(0), right, scores.row(0), kTileStride);
    }
  }

  // sums[rows, dim] += weights[rows, keys] x values[keys, dim]
  void add_weighted_keys(Tile<T>& weights, StridedRows<T> values, int rows, int keys, int dim, int group, bool causal,
                         Tile<T>& sums) {
    if (causal) {
      multiply<T, kTileStride, 1, true, Part::kReduceToRow>(rows, dim, keys, weights.row(0), values, sums.row(0),
                                                            kTileStride, group);
    } else {
      multiply<T, kTileStride, 1, true>(rows, dim, keys, weights.row(0), values, sums.row(0), kTileStride);
    }
  }

  // sums[keys, dim] += weights[rows, keys]^T x values[rows, dim]
  void add_weighted_rows(Tile<T>& weights, Tile<T>& values, int rows, int keys, int dim, int group, bool causal,
                         T* sums, std::ptrdiff_t stride) {
    const StridedRows<T> right{values.row(0), kTileStride};
    if (causal) {
      multiply<T, 1, kTileStride, true, Part::kReduceFromRow>(keys, dim, rows, weights.row(0), right, sums, stride,
                                                              group);
    } else {
      multiply<T, 1, kTileStride, true>(keys, dim, rows, weights.row(0), right, sums, stride);
    }
  }

  void forward_tile(const BranchAttention<T>& job, const QueryTile& tile, int kv_head) {
    const int rows = (tile.end - tile.begin) * job.group;
    load_rows(job.q, job, tile, kv_head, job.scale, query_);
    output_.clear(rows, job.dim);
    softmax_.start(rows);
    for_each_piece(job.plan, tile, [&](const KeyPiece& piece) {
      const int keys = piece.end - piece.begin;
      dot_products(query_, packed(job.packed_keys, job, kv_head, piece.begin), rows, keys, job.dim, job.group,
                   piece.causal, scores_);
      const auto limit_of = [&](int r) { return piece.causal ? r / job.group + 1 : keys; };
      softmax_.absorb(scores_, 0, rows, keys, limit_of, output_, job.dim);
      add_weighted_keys(scores_, natural(job.v, kv_head, piece.begin), rows, keys, job.dim, job.group, piece.causal,
                        output_);
    });
    for_each_row(job, tile, kv_head, [&](int r, int64_t query, int head) {
      T* to = job.output.row(query, head);
      const T factor = T(1) / softmax_.total(r);
      for (int i = 0; i < job.dim; ++i) to[i] = output_.row(r)[i] * factor;
      job.log_sums[query * job.num_heads() + head] = softmax_.log_sum(r);
    });
  }

  void backward_tile(const BranchAttention<T>& job, const BranchAttentionGradient<T>& gradient, const QueryTile& tile,
                     int kv_head, const HeadTensor<T>& dk, const HeadTensor<T>& dv) {
    const int rows = (tile.end - tile.begin) * job.group;
    load_rows(job.q, job, tile, kv_head, T(1), query_);
    load_rows(gradient.output, job, tile, kv_head, T(1), gradient_);
    load_statistics(job, tile, kv_head);
    output_.clear(rows, job.dim);  // becomes the gradient of q
    for_each_piece(job.plan, tile, [&](const KeyPiece& piece) {
      const int keys = piece.end - piece.begin;
      dot_products(query_, packed(job.packed_keys, job, kv_head, piece.begin), rows, keys, job.dim, job.group,
                   piece.causal, weights_);
      dot_products(gradient_, packed(gradient.packed_values, job, kv_head, piece.begin), rows, keys, job.dim, job.group,
                   piece.causal, scores_);
      for (int r = 0; r < rows; ++r) {
        differentiate_softmax(r, piece.causal ? r / job.group + 1 : keys, keys, job.scale);
      }
      add_weighted_rows(weights_, gradient_, rows, keys, job.dim, job.group, piece.causal, dv.row(piece.begin, kv_head),
                        dv.token_stride);
      add_weighted_keys(scores_, natural(job.k, kv_head, piece.begin), rows, keys, job.dim, job.group, piece.causal,
                        output_);
      add_weighted_rows(scores_, query_, rows, keys, job.dim, job.group, piece.causal, dk.row(piece.begin, kv_head),
                        dk.token_stride);
    });
    for_each_row(job, tile, kv_head, [&](int r, int64_t query, int head) {
      std::copy_n(output_.row(r), job.dim, gradient.q.row(query, head));
    });
  }

  // Log-sums of the rows, and the inner products of output and its gradient.
  void load_statistics(const BranchAttention<T>& job, const QueryTile& tile, int kv_head) {
    for_each_row(job, tile, kv_head, [&](int r, int64_t query, int head) {
      const T* output = job.output.row(query, head);
      Vec<T> sum{};
      for (int i = 0; i < job.dim; i += kLanes<T>) sum += load(output + i) * load(gradient_.row(r) + i);
      inner_[r] = sum_lanes<T>(sum);
      log_sum_[r] = job.log_sums[query * job.num_heads() + head];
    });
  }

  // weights: scores -> softmax; scores: gradient of the softmax -> gradient of the scores. Zero from `limit` on.
  void differentiate_softmax(int r, int limit, int keys, T scale) {
    T* weights = weights_.row(r);
    T* scores = scores_.row(r);
    const Vec<T> log_sum = broadcast<T>(log_sum_[r]);
    const Vec<T> inner = broadcast<T>(inner_[r]);
    const Vec<T> factor = broadcast<T>(scale);
    for (int j = 0; j < limit; j += kLanes<T>) {
      const Vec<T> weight = exp_of(load(weights + j) * factor - log_sum);
      store<T>(weights + j, weight);
      store<T>(scores + j, weight * (load(scores + j) - inner) * factor);
    }
    for (int j = limit; j < keys; ++j) weights[j] = scores[j] = 0;
  }

  Tile<T> query_;
  Tile<T> scores_;
  Tile<T> output_;
  Tile<T> gradient_;
  Tile<T> weights_;
  RunningSoftmax<T> softmax_;
  T log_sum_[kTileRows];  // in backward: of the forward's softmax
  T inner_[kTileRows];    // in backward: output x its gradient
};

NPR_ISA_END
