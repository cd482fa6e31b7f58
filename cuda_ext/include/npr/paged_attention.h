// Attention of new tokens to keys and values that lie in slots of a cache. Torch-free.
//
// A task is a run of tokens and one key head. The tokens of a run stand in one table row (a prefill chunk), or in rows
// that begin with the same slots (branches of one fork, samples of one prompt): the keys that they share are read once
// for all of them, then each goes on alone. A vector of keys at a time is transposed in registers and scored against
// every query row.
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
  const int32_t* rows;     // [T]
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
  int32_t table_row;  // of the first token
  int32_t together;   // keys at the front that are read for all tokens; a token beyond its length sees none of them
  bool one_row;       // all tokens stand in one table row: every key is read together
};

template <typename Stored>
class PagedAttentionTask {
 public:
  using T = ComputeOf<Stored>;
  static constexpr int kMaxTokens = kTileRows;
  static constexpr int kKeysAhead = 32;

  PagedAttentionTask() : query_(kTileRows), scores_(kTileRows), output_(kTileRows) {}

  static int tokens_per_run(int group) { return std::max(1, kTileRows / group); }

  void run(const PagedAttention<Stored>& job, const TokenRun& tokens, int kv_head) {
    const int group = job.num_heads / job.num_kv_heads;
    const int rows = tokens.count * group;
    load_queries(job, tokens, kv_head, group);
    output_.clear(rows);
    softmax_.start(rows);
    absorb_keys(job, tokens, kv_head, tokens.table_row, 0, tokens.together, 0, rows);
    if (!tokens.one_row) {
      for (int i = 0; i < tokens.count; ++i) {
        const int64_t token = tokens.first + i;
        absorb_keys(job, tokens, kv_head, job.rows[token], tokens.together, job.lengths[token], i * group,
                    (i + 1) * group);
      }
    }
    store_output(job, tokens, kv_head, group);
  }

 private:
  // Query rows [row_begin, row_end) take in the keys [key_begin, key_end) of a table row.
  void absorb_keys(const PagedAttention<Stored>& job, const TokenRun& tokens, int kv_head, int64_t table_row,
                   int key_begin, int key_end, int row_begin, int row_end) {
    const int group = job.num_heads / job.num_kv_heads;
    const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(job.num_kv_heads) * job.dim;
    const std::ptrdiff_t head = static_cast<std::ptrdiff_t>(kv_head) * job.dim;
    for (int begin = key_begin; begin < key_end; begin += kTileKeys) {
      const int keys = std::min(kTileKeys, key_end - begin);
      const int32_t* slots = job.tables + table_row * job.table_width + begin;
      const SlotRows<Stored> key_rows{job.k_cache + head, stride, slots};
      const SlotRows<Stored> value_rows{job.v_cache + head, stride, slots};
      score(key_rows, value_rows, row_begin, row_end, keys, job.dim);
      const auto limit_of = [&](int r) { return std::clamp(job.lengths[tokens.first + r / group] - begin, 0, keys); };
      softmax_.absorb(scores_, row_begin, row_end, keys, limit_of, output_, job.dim);
      add_values(value_rows, row_begin, row_end, keys, job.dim);
    }
  }

  void load_queries(const PagedAttention<Stored>& job, const TokenRun& tokens, int kv_head, int group) {
    for (int r = 0; r < tokens.count * group; ++r) {
      const Stored* from = job.q + head_offset(job, tokens, kv_head, group, r);
      for (int j = 0; j < job.dim; ++j) query_.row(r)[j] = widen(from[j]) * job.scale;
      std::fill(query_.row(r) + job.dim, query_.row(r) + round_up_to_lanes<T>(job.dim), T(0));
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

  void score(SlotRows<Stored> key_rows, SlotRows<Stored> value_rows, int row_begin, int row_end, int keys, int dim) {
    for (int j = 0; j < keys; j += kLanes<T>) {
      const int last = std::min(kLanes<T>, keys - j) - 1;
      for (int i = 0; i < dim; i += kLanes<T>) {
        const int count = std::min(kLanes<T>, dim - i);
        Vec<T> block[kLanes<T>];  // of keys, then of dimensions; beyond `last` the last key again
        if (count == kLanes<T>) {
#pragma GCC unroll 16
          for (int lane = 0; lane < kLanes<T>; ++lane) {
            const int key = j + std::min(lane, last);
            block[lane] = load(key_rows(key) + i);
            // Slots lie anywhere: memory is asked for these values, and for the keys after next, before they are needed.
            __builtin_prefetch(value_rows(key) + i);
            __builtin_prefetch(key_rows(std::min(key + kKeysAhead, keys - 1)) + i);
          }
        } else {
          for (int lane = 0; lane < kLanes<T>; ++lane) {
            block[lane] = load_part(key_rows(j + std::min(lane, last)) + i, count);
          }
        }
        transpose<kLanes<T>, T>(block);
        for (int r = row_begin; r < row_end; ++r) {
          const T* query = query_.row(r) + i;  // zero from `dim` on
          Vec<T> sums[4] = {};
#pragma GCC unroll 16
          for (int lane = 0; lane < kLanes<T>; ++lane) sums[lane % 4] += block[lane] * broadcast<T>(query[lane]);
          const Vec<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
          T* to = scores_.row(r) + j;
          store<T>(to, i == 0 ? sum : load(to) + sum);
        }
      }
    }
  }

  void add_values(SlotRows<Stored> value_rows, int row_begin, int row_end, int keys, int dim) {
    if (dim % kLanes<T> != 0) {
      for (int r = row_begin; r < row_end; ++r) {
        for (int j = 0; j < keys; ++j) {
          for (int i = 0; i < dim; ++i) output_.row(r)[i] += scores_.row(r)[j] * widen(value_rows(j)[i]);
        }
      }
      return;
    }
    multiply<T, kTileStride, 1, true>(row_end - row_begin, dim, keys, scores_.row(row_begin), value_rows,
                                      output_.row(row_begin), kTileStride);
  }

  Tile<T> query_;
  Tile<T> scores_;
  Tile<T> output_;
  RunningSoftmax<T> softmax_;
};

}  // namespace npr
