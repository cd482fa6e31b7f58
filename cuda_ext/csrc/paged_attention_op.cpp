// npr::paged_attention on the CPU, around npr/paged_attention.h.
#include "npr/paged_attention.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <memory>
#include <vector>

#include "tasks.h"

namespace npr {
namespace {

// Tokens of one table row that stand together form a run; a run never reads outside its table or the cache.
std::vector<TokenRun> make_runs(const at::Tensor& tables, const at::Tensor& row_of_token, const at::Tensor& lengths,
                                int64_t num_slots, int tokens_per_run) {
  const int32_t* rows = row_of_token.const_data_ptr<int32_t>();
  const int32_t* counts = lengths.const_data_ptr<int32_t>();
  std::vector<TokenRun> runs;
  for (int64_t t = 0; t < row_of_token.numel(); ++t) {
    TORCH_CHECK_VALUE(rows[t] >= 0 && rows[t] < tables.size(0), "token ", t, " names table row ", rows[t], " of ",
                      tables.size(0));
    TORCH_CHECK_VALUE(counts[t] >= 0 && counts[t] <= tables.size(1), "token ", t, " has length ", counts[t],
                      ", but tables hold ", tables.size(1), " slots a row");
    const bool joins = !runs.empty() && runs.back().table_row == rows[t] && runs.back().count < tokens_per_run;
    if (!joins) runs.push_back({t, 0, rows[t], 0});
    runs.back().count += 1;
    runs.back().longest = std::max(runs.back().longest, counts[t]);
  }
  for (const TokenRun& run : runs) {
    const int32_t* slots = tables.const_data_ptr<int32_t>() + run.table_row * tables.size(1);
    int32_t lowest = 0;
    int32_t highest = 0;
    for (int32_t i = 0; i < run.longest; ++i) {
      lowest = std::min(lowest, slots[i]);
      highest = std::max(highest, slots[i]);
    }
    TORCH_CHECK_VALUE(lowest >= 0 && (run.longest == 0 || highest < num_slots), "table row ", run.table_row,
                      " names slot ", lowest < 0 ? lowest : highest, " of a cache of ", num_slots);
  }
  return runs;
}

template <typename Stored>
void attend(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& tables,
            const at::Tensor& lengths, const std::vector<TokenRun>& runs, double scale, at::Tensor& output) {
  const int num_kv_heads = static_cast<int>(k_cache.size(1));
  const PagedAttention<Stored> job{static_cast<const Stored*>(q.const_data_ptr()),
                                   static_cast<const Stored*>(k_cache.const_data_ptr()),
                                   static_cast<const Stored*>(v_cache.const_data_ptr()),
                                   static_cast<Stored*>(output.mutable_data_ptr()),
                                   tables.const_data_ptr<int32_t>(),
                                   lengths.const_data_ptr<int32_t>(),
                                   tables.size(1),
                                   static_cast<int>(q.size(1)),
                                   num_kv_heads,
                                   static_cast<int>(q.size(2)),
                                   static_cast<ComputeOf<Stored>>(scale)};
  run_tasks(static_cast<int64_t>(runs.size()) * num_kv_heads, [&] {
    return [&job, &runs, num_kv_heads, task = std::make_unique<PagedAttentionTask<Stored>>()](int64_t index) {
      task->run(job, runs[index / num_kv_heads], static_cast<int>(index % num_kv_heads));
    };
  });
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const at::Tensor& tables, const at::Tensor& row_of_token, const at::Tensor& lengths,
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
  TORCH_CHECK_VALUE(tables.dim() == 2 && tables.scalar_type() == at::kInt, "tables must be int32 [rows, width]");
  TORCH_CHECK_VALUE(row_of_token.scalar_type() == at::kInt && row_of_token.sizes() == at::IntArrayRef{q.size(0)} &&
                        lengths.scalar_type() == at::kInt && lengths.sizes() == at::IntArrayRef{q.size(0)},
                    "row_of_token and lengths must be int32 [T]");
  const int group = static_cast<int>(q.size(1) / k_cache.size(1));
  TORCH_CHECK_VALUE(group <= kTileRows, "at most ", kTileRows, " query heads share a key head, not ", group);
  const at::Tensor queries = q.contiguous();
  const at::Tensor table = tables.contiguous();
  const at::Tensor row = row_of_token.contiguous();
  const at::Tensor length = lengths.contiguous();
  at::Tensor output = at::empty_like(queries);
  const std::vector<TokenRun> runs = make_runs(table, row, length, k_cache.size(0), std::max(1, kTileRows / group));
  switch (q.scalar_type()) {
    case at::kFloat:
      attend<float>(queries, k_cache, v_cache, table, length, runs, scale, output);
      break;
    case at::kDouble:
      attend<double>(queries, k_cache, v_cache, table, length, runs, scale, output);
      break;
    case at::kBFloat16:
      attend<BFloat16>(queries, k_cache, v_cache, table, length, runs, scale, output);
      break;
    default:
      TORCH_CHECK_VALUE(false, "paged_attention computes in float32, float64 or bfloat16, not ", q.scalar_type());
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(npr, library) {
  library.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor tables, Tensor row_of_token, Tensor lengths, "
      "float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(npr, CPU, library) { library.impl("paged_attention", &paged_attention); }

}  // namespace npr
