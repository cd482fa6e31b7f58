// Attention of new tokens to keys and values that lie in slots of a cache. Torch-free.
//
// A task is a run of tokens and one key head. The tokens of a run share a block table (a prefill chunk), or
// their block tables begin with the same slots (branches of one fork, samples of one prompt): the keys that they share
// are read once for all of them, then each goes on alone. For many query rows a vector of keys at a time is transposed
// in registers and scored against each; for few rows the transposition would cost more than the products, and they take
// dot products that are reduced a vector of keys at a time.
#pragma once

#include <cstdint>

#include "npr/products.h"
#include "npr/tile.h"
#include "npr/token_run.h"

NPR_ISA_BEGIN

template <typename Stored>
struct PagedAttention {
  const Stored* q;        // [T, N, H]
  const Stored* k_cache;  // [S, K, H]
  const Stored* v_cache;
  Stored* output;               // [T, N, H]
  const int32_t* block_tables;  // [rows, width]
  const int32_t* rows;          // [T]
  const int32_t* lengths;       // [T]
  int64_t table_width;
  int num_heads;
  int num_kv_heads;
  int dim;
  ComputeOf<Stored> scale;
};

template <typename Products>
class PagedAttentionTask {
 public:
  using Stored = typename Products::Stored;
  using T = typename Products::Sum;
  static constexpr int kKeysAhead = 32;
  // A vector of keys (16) costs 45 steps of reduction a head by dot products, 4 steps a dimension to be transposed.
  static constexpr int kMostDotRows = 4;
  static bool suits_dots(int heads, int dim) { return heads <= kMostDotRows && 45 * heads <= 4 * dim; }

  PagedAttentionTask() : query_(kTileRows), scores_(kTileRows), output_(kTileRows) {}

  void run(const PagedAttention<Stored>& job, const TokenRun& tokens, int kv_head) {
    const int group = job.num_heads / job.num_kv_heads;
    const int rows = tokens.count * group;
    load_queries(job, tokens, kv_head, group);
    output_.clear(rows, job.dim);
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
  // Query rows [row_begin, row_end) take in the keys [key_begin, key_end) of a block table.
  void absorb_keys(const PagedAttention<Stored>& job, const TokenRun& tokens, int kv_head, int64_t table_row,
                   int key_begin, int key_end, int row_begin, int row_end) {
    const int group = job.num_heads / job.num_kv_heads;
    const std::ptrdiff_t head = static_cast<std::ptrdiff_t>(kv_head) * job.dim;
    for (int begin = key_begin; begin < key_end; begin += kTileKeys) {
      const int keys = std::min(kTileKeys, key_end - begin);
      find_keys(job, table_row, begin, keys);
      const OffsetRows<Stored> key_rows{job.k_cache + head, offsets_};
      const OffsetRows<Stored> value_rows{job.v_cache + head, offsets_};
      const int num_rows = row_end - row_begin;
      if (num_rows == group && suits_dots(group, job.dim)) {
        const Stored* query = job.q + first_head(job, tokens.first + row_begin / group, kv_head, group);
        if (group == 1) score_dots<1>(job, query, key_rows, value_rows, row_begin, keys);
        if (group == 2) score_dots<2>(job, query, key_rows, value_rows, row_begin, keys);
        if (group == 3) score_dots<3>(job, query, key_rows, value_rows, row_begin, keys);
        if (group == 4) score_dots<4>(job, query, key_rows, value_rows, row_begin, keys);
      } else {
        score(key_rows, value_rows, row_begin, row_end, keys, job.dim);
      }
      for (int r = row_begin, token = row_begin / group; r < row_end; ++token) {
        const int limit = std::clamp(job.lengths[tokens.first + token] - begin, 0, keys);
        for (int n = 0; n < group; ++n, ++r) limits_[r] = limit;
      }
      const auto limit_of = [&](int r) { return limits_[r]; };
      softmax_.absorb(scores_, row_begin, row_end, keys, limit_of, output_, job.dim);
      add_values(value_rows, row_begin, row_end, keys, job.dim);
    }
  }

  // Where the keys lie, the last one again beyond `keys`: whole vectors are read, and keys ahead are prefetched.
  void find_keys(const PagedAttention<Stored>& job, int64_t table_row, int begin, int keys) {
    const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(job.num_kv_heads) * job.dim;
    const int32_t* slots = job.block_tables + table_row * job.table_width + begin;
    for (int j = 0; j < keys; ++j) offsets_[j] = slots[j] * stride;
    std::fill_n(offsets_ + keys, kLanes<T> + kKeysAhead, offsets_[keys - 1]);
  }

  // Query row r is head r % group of token r / group.
  void load_queries(const PagedAttention<Stored>& job, const TokenRun& tokens, int kv_head, int group) {
    for (int i = 0, r = 0; i < tokens.count; ++i) {
      const Stored* from = job.q + first_head(job, tokens.first + i, kv_head, group);
      for (int n = 0; n < group; ++n, ++r, from += job.dim) {
        T* to = query_.row(r);  // whole vectors, zero from `dim` on
        for (int j = 0; j < job.dim; j += kLanes<T>) store<T>(to + j, load_part(from + j, job.dim - j) * job.scale);
      }
    }
  }

  void store_output(const PagedAttention<Stored>& job, const TokenRun& tokens, int kv_head, int group) {
    for (int i = 0, r = 0; i < tokens.count; ++i) {
      Stored* to = job.output + first_head(job, tokens.first + i, kv_head, group);
      for (int n = 0; n < group; ++n, ++r, to += job.dim) {
        const T total = softmax_.total(r);
        const T factor = total == 0 ? T(0) : T(1) / total;  // no keys: zero
        const T* from = output_.row(r);
#pragma omp simd
        for (int j = 0; j < job.dim; ++j) to[j] = narrow<Stored>(from[j] * factor);
      }
    }
  }

  static std::ptrdiff_t first_head(const PagedAttention<Stored>& job, int64_t token, int kv_head, int group) {
    return (token * job.num_heads + static_cast<std::ptrdiff_t>(kv_head) * group) * job.dim;
  }

  void score(OffsetRows<Stored> key_rows, OffsetRows<Stored> value_rows, int row_begin, int row_end, int keys,
             int dim) {
    for (int j = 0; j < keys; j += kLanes<T>) {
      for (int i = 0; i < dim; i += kLanes<T>) {
        const int count = std::min(kLanes<T>, dim - i);
        Vec<T> block[kLanes<T>];  // of keys, then of dimensions
        if (count == kLanes<T>) {
#pragma GCC unroll 16
          for (int lane = 0; lane < kLanes<T>; ++lane) {
            block[lane] = load(key_rows(j + lane) + i);
            // Slots lie anywhere: memory is asked for these values, and for the keys after next, before they are
            // needed.
            __builtin_prefetch(value_rows(j + lane) + i);
            __builtin_prefetch(key_rows(j + lane + kKeysAhead) + i);
          }
        } else {
          for (int lane = 0; lane < kLanes<T>; ++lane) block[lane] = load_part(key_rows(j + lane) + i, count);
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

  // The scores of the kRows heads of one token, whose queries lie one after the other.
  template <int kRows>
  void score_dots(const PagedAttention<Stored>& job, const Stored* query, OffsetRows<Stored> key_rows,
                  OffsetRows<Stored> value_rows, int row_begin, int keys) {
    constexpr int kStep = kLanes<T> * Products::kPerLane;
    constexpr int kCacheLine = 64 / static_cast<int>(sizeof(Stored));
    const int whole = job.dim / kStep * kStep;
    for (int j = 0; j < keys; j += kLanes<T>) {
      Vec<T> sums[kRows][kLanes<T>];
#pragma GCC unroll 2
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        const Stored* key = key_rows(j + lane);
        // Slots lie anywhere: memory is asked for these values, and for the keys after next, before they are needed.
        for (int i = 0; i < job.dim; i += kCacheLine) {
          __builtin_prefetch(value_rows(j + lane) + i);
          __builtin_prefetch(key_rows(j + lane + kKeysAhead) + i);
        }
        Vec<T> row_sums[kRows] = {};
        for (int i = 0; i < whole; i += kStep) {
          const Vec<T> ks = Products::load(key + i);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            row_sums[r] = Products::add(row_sums[r], ks, Products::load(query + r * job.dim + i));
          }
        }
        if (whole < job.dim) {
          const Vec<T> ks = Products::load_part(key + whole, job.dim - whole);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            row_sums[r] =
                Products::add(row_sums[r], ks, Products::load_part(query + r * job.dim + whole, job.dim - whole));
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r][lane] = row_sums[r];
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        store<T>(scores_.row(row_begin + r) + j, reduce_rows<T>(sums[r], Add{}) * job.scale);
      }
    }
  }

  void add_values(OffsetRows<Stored> value_rows, int row_begin, int row_end, int keys, int dim) {
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
  std::ptrdiff_t offsets_[kTileKeys + kLanes<T> + kKeysAhead];
  int limits_[kTileRows];
};

NPR_ISA_END
