// npr::paged_attention on the CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/cpu_operators.h"
#include "npr/sizes.h"

namespace npr {
namespace {

constexpr int32_t kKeysWorthSharing = 16;

// Keys at the front of two block tables that lie in the same slots.
int32_t common_keys(const int32_t* slots, const int32_t* others, int32_t limit) {
  return static_cast<int32_t>(std::mismatch(slots, slots + limit, others).first - slots);
}

void check_slots(const int32_t* slots, int32_t begin, int32_t end, int64_t table_row, int64_t num_slots) {
  int32_t lowest = 0;
  int32_t highest = 0;
  for (int32_t i = begin; i < end; ++i) {
    lowest = std::min(lowest, slots[i]);
    highest = std::max(highest, slots[i]);
  }
  TORCH_CHECK_VALUE(lowest >= 0 && (begin >= end || highest < num_slots), "row ", table_row,
                    " of block_tables names slot ", lowest < 0 ? lowest : highest, " of a cache of ", num_slots);
}

// Neighbouring tokens form a run if they share a block table, or if reading the front of their rows together saves
// more keys than the run has saved so far. A run never reads outside its block tables or the cache.
std::vector<TokenRun> make_runs(const at::Tensor& block_tables, const at::Tensor& row_of_token,
                                const at::Tensor& lengths, int64_t num_slots, int tokens_per_run) {
  const int32_t* rows = row_of_token.const_data_ptr<int32_t>();
  const int32_t* counts = lengths.const_data_ptr<int32_t>();
  const int32_t* table = block_tables.const_data_ptr<int32_t>();
  const int64_t width = block_tables.size(1);
  std::vector<TokenRun> runs;
  for (int64_t t = 0; t < row_of_token.numel(); ++t) {
    TORCH_CHECK_VALUE(rows[t] >= 0 && rows[t] < block_tables.size(0), "row_of_token[", t, "] is ", rows[t],
                      ", but block_tables has ", block_tables.size(0), " rows");
    TORCH_CHECK_VALUE(counts[t] >= 0 && counts[t] <= width, "lengths[", t, "] is ", counts[t],
                      ", but block_tables has ", width, " slots a row");
    if (!runs.empty() && runs.back().count < tokens_per_run) {
      TokenRun& run = runs.back();
      if (run.one_row && run.table_row == rows[t]) {
        run.count += 1;
        run.together = std::max(run.together, counts[t]);
        continue;
      }
      if (run.count == 1 || !run.one_row) {
        const int32_t common =
            common_keys(table + run.table_row * width, table + rows[t] * width, std::min(run.together, counts[t]));
        if (common >= kKeysWorthSharing && int64_t{common} * run.count > int64_t{run.together} * (run.count - 1)) {
          run.count += 1;
          run.together = common;
          run.one_row = false;
          continue;
        }
      }
    }
    runs.push_back({t, 1, rows[t], counts[t], true});
  }
  for (const TokenRun& run : runs) {
    check_slots(table + run.table_row * width, 0, run.together, run.table_row, num_slots);
    for (int64_t t = run.first; !run.one_row && t < run.first + run.count; ++t) {
      check_slots(table + rows[t] * width, run.together, counts[t], rows[t], num_slots);
    }
  }
  return runs;
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const at::Tensor& block_tables, const at::Tensor& row_of_token, const at::Tensor& lengths,
                           double scale) {
  TORCH_CHECK_VALUE(q.dim() == 3 && k_cache.dim() == 3 && v_cache.sizes() == k_cache.sizes() &&
                        q.size(2) == k_cache.size(2) && k_cache.size(1) > 0 && q.size(1) % k_cache.size(1) == 0,
                    "q [T, N, H] and caches [S, K, H] do not fit: ", q.sizes(), ", ", k_cache.sizes(), ", ",
                    v_cache.sizes());
  TORCH_CHECK_VALUE(q.scalar_type() == k_cache.scalar_type() && q.scalar_type() == v_cache.scalar_type(),
                    "q and caches differ in type: ", q.scalar_type(), ", ", k_cache.scalar_type(), ", ",
                    v_cache.scalar_type());
  TORCH_CHECK_VALUE(q.size(2) <= kMaxHeadDim, "a head has at most ", kMaxHeadDim, " dimensions, not ", q.size(2));
  TORCH_CHECK_VALUE(k_cache.is_contiguous() && v_cache.is_contiguous(), "the caches must be contiguous");
  TORCH_CHECK_VALUE(block_tables.dim() == 2 && block_tables.scalar_type() == at::kInt,
                    "block_tables must be int32 [rows, width]");
  TORCH_CHECK_VALUE(row_of_token.scalar_type() == at::kInt && row_of_token.sizes() == at::IntArrayRef{q.size(0)} &&
                        lengths.scalar_type() == at::kInt && lengths.sizes() == at::IntArrayRef{q.size(0)},
                    "row_of_token and lengths must be int32 [T]");
  const int group = static_cast<int>(q.size(1) / k_cache.size(1));
  TORCH_CHECK_VALUE(group <= kTileRows, "at most ", kTileRows, " query heads share a key head, not ", group);
  const at::Tensor queries = q.contiguous();
  const at::Tensor table = block_tables.contiguous();
  const at::Tensor row = row_of_token.contiguous();
  const at::Tensor length = lengths.contiguous();
  at::Tensor output = at::empty_like(queries);
  const std::vector<TokenRun> runs = make_runs(table, row, length, k_cache.size(0), std::max(1, kTileRows / group));
  cpu_operators(q.scalar_type(), "paged_attention")
      .paged_attention(queries, k_cache, v_cache, table, row, length, runs, scale, output);
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(npr, library) {
  library.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor row_of_token, "
      "Tensor lengths, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(npr, CPU, library) { library.impl("paged_attention", &paged_attention); }

}  // namespace npr
