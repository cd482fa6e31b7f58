// Attention of new tokens to keys and values that lie in slots of a cache. Torch-free.
//
// A task is a run of tokens of one table row, and one key head. Few query rows (decoding): dot products with the keys
// where they lie. Many (a prefill chunk): keys are gathered and transposed once for the tile.
#pragma once

#include <cstdint>

#include "npr/tile.h"

namespace npr {

template <typename Stored>
struct PagedAttention {
  const Stored* q;        // [T, N, H]
  const Stored* k_cache;  // [S, K, H]
  const Stored* v_cache;
  Stored* output;          // [T, N, H]
  const int32_t* tables;   // [rows, width]
  const int32_t* lengths;  // [T]
  int64_t table_width;
  int num_heads;
  int num_kv_heads;
  int dim;
  ComputeOf<Stored> scale;
};

struct TokenRun {
  int64_t first;
  int32_t count;
  int32_t table_row;
  int32_t longest;  // most keys of any of its tokens
};

constexpr int kRowsWorthTransposing = 12;

template <typename Stored>
class PagedAttentionTask {
 public:
  using T = ComputeOf<Stored>;
  static constexpr int kMaxTokens = kTileRows;

  PagedAttentionTask() : query_(kTileRows), scores_(kTileRows), output_(kTileRows), keys_(kMaxHeadDim) {}

  static int tokens_per_run(int group) { return std::max(1, kTileRows / group); }

  void run(const PagedAttention<Stored>& job, const TokenRun& tokens, int kv_head) {
    const int group = job.num_heads / job.num_kv_heads;
    const int rows = tokens.count * group;
    load_queries(job, tokens, kv_head, group);
    output_.clear(rows);
    softmax_.start(rows);
    const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(job.num_kv_heads) * job.dim;
    const std::ptrdiff_t head = static_cast<std::ptrdiff_t>(kv_head) * job.dim;
    for (int begin = 0; begin < tokens.longest; begin += kTileKeys) {
      const int keys = std::min(kTileKeys, tokens.longest - begin);
      const int32_t* slots = job.tables + tokens.table_row * job.table_width + begin;
      const SlotRows<Stored> key_rows{job.k_cache + head, stride, slots};
      if (rows >= kRowsWorthTransposing) {
        score_by_product(key_rows, rows, keys, job.dim);
      } else {
        score_by_dots(key_rows, SlotRows<Stored>{job.v_cache + head, stride, slots}, rows, keys, job.dim);
      }
      const auto limit_of = [&](int r) { return std::clamp(job.lengths[tokens.first + r / group] - begin, 0, keys); };
      softmax_.absorb(scores_, rows, keys, limit_of, output_, job.dim);
      add_values(SlotRows<Stored>{job.v_cache + head, stride, slots}, rows, keys, job.dim);
    }
    store_output(job, tokens, kv_head, group);
  }

 private:
  void load_queries(const PagedAttention<Stored>& job, const TokenRun& tokens, int kv_head, int group) {
    for (int r = 0; r < tokens.count * group; ++r) {
      const Stored* from = job.q + head_offset(job, tokens, kv_head, group, r);
      for (int j = 0; j < job.dim; ++j) query_.row(r)[j] = widen(from[j]) * job.scale;
    }
  }

  void store_output(const PagedAttention<Stored>& job, const TokenRun& tokens, int kv_head, int group) {
    for (int r = 0; r < tokens.count * group; ++r) {
      Stored* to = job.output + head_offset(job, tokens, kv_head, group, r);
      const T total = softmax_.total(r);
      const T factor = total == 0 ? T(0) : T(1) / total;  // no keys: zero
      for (int j = 0; j < job.dim; ++j) to[j] = narrow<Stored>(output_.row(r)[j] * factor);
    }
  }

  static std::ptrdiff_t head_offset(const PagedAttention<Stored>& job, const TokenRun& tokens, int kv_head, int group,
                                    int r) {
    return ((tokens.first + r / group) * job.num_heads + kv_head * group + r % group) * job.dim;
  }

  void score_by_product(SlotRows<Stored> key_rows, int rows, int keys, int dim) {
    for (int j = 0; j < keys; ++j) {
      const Stored* key = key_rows(j);
      for (int i = 0; i < dim; ++i) keys_.row(i)[j] = widen(key[i]);
    }
    multiply<T, kTileStride, 1, false>(rows, keys, dim, query_.row(0), StridedRows<T>{keys_.row(0), kTileStride},
                                       scores_.row(0), kTileStride);
  }

  // Slots lie anywhere, so memory is asked for the next keys, and for these keys' values, before they are needed.
  static void prefetch(const Stored* row, int dim) {
    for (int i = 0; i < dim; i += 64 / static_cast<int>(sizeof(Stored))) __builtin_prefetch(row + i);
  }

  void score_by_dots(SlotRows<Stored> key_rows, SlotRows<Stored> value_rows, int rows, int keys, int dim) {
    if (dim % kLanes<T> != 0) {
      for (int r = 0; r < rows; ++r) {
        for (int j = 0; j < keys; ++j) {
          T sum = 0;
          for (int i = 0; i < dim; ++i) sum += query_.row(r)[i] * widen(key_rows(j)[i]);
          scores_.row(r)[j] = sum;
        }
      }
      return;
    }
    for (int j = 0; j < keys; j += kLanes<T>) {
      const int last = std::min(kLanes<T>, keys - j) - 1;
      for (int lane = 0; lane <= last; ++lane) prefetch(value_rows(j + lane), dim);
      for (int next = j + kLanes<T>; next < std::min(keys, j + 2 * kLanes<T>); ++next) prefetch(key_rows(next), dim);
      for (int r = 0; r < rows; ++r) {
        Vec<T> products[kLanes<T>];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes<T>; ++lane) {
          const Stored* key = key_rows(j + std::min(lane, last));
          Vec<T> sum{};
          for (int i = 0; i < dim; i += kLanes<T>) sum += load(query_.row(r) + i) * load(key + i);
          products[lane] = sum;
        }
        store<T>(scores_.row(r) + j, reduce_rows<T>(products, Add{}));
      }
    }
  }

  void add_values(SlotRows<Stored> value_rows, int rows, int keys, int dim) {
    if (dim % kLanes<T> != 0) {
      for (int r = 0; r < rows; ++r) {
        for (int j = 0; j < keys; ++j) {
          for (int i = 0; i < dim; ++i) output_.row(r)[i] += scores_.row(r)[j] * widen(value_rows(j)[i]);
        }
      }
      return;
    }
    multiply<T, kTileStride, 1, true>(rows, dim, keys, scores_.row(0), value_rows, output_.row(0), kTileStride);
  }

  Tile<T> query_;
  Tile<T> scores_;
  Tile<T> output_;
  Tile<T> keys_;  // transposed: [dim, keys]
  RunningSoftmax<T> softmax_;
};

}  // namespace npr
