// npr::attention_plan and npr::block_lists on the CPU, around npr/layout/visibility.h.
#include "npr/layout/visibility.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <vector>

#include "layout_check.h"
#include "plan_tensor.h"

namespace npr {
namespace {

std::vector<KeyRun> key_runs(const at::Tensor& layout) {
  check_layout(layout);
  const at::Tensor arrays = layout.contiguous();
  const int64_t num_tokens = arrays.size(1);
  const int32_t* rows = arrays.const_data_ptr<int32_t>();
  std::vector<KeyRun> runs;
  TORCH_CHECK_VALUE(make_key_runs(rows + num_tokens, rows + 2 * num_tokens, rows + 3 * num_tokens,
                                  static_cast<int32_t>(num_tokens), runs),
                    "this int32 [5, ", num_tokens, "] tensor is no layout: its intervals leave their sequences");
  return runs;
}

at::Tensor attention_plan(const at::Tensor& layout, int64_t first_query) {
  check_first_query(layout, first_query);
  return plan_to_tensor(
      make_attention_plan(key_runs(layout), static_cast<int32_t>(layout.size(1)), static_cast<int32_t>(first_query)));
}

// Counts and indices of the tiles listed in one direction: [rows], [rows, columns] (the rest of a row is zero).
struct BlockList {
  at::Tensor counts;
  at::Tensor indices;
  int32_t* count;
  int32_t* index;
  int64_t columns;

  BlockList(int64_t rows, int64_t columns)
      : counts(at::zeros({rows}, at::kInt)),
        indices(at::zeros({rows, columns}, at::kInt)),
        count(counts.mutable_data_ptr<int32_t>()),
        index(indices.mutable_data_ptr<int32_t>()),
        columns(columns) {}

  void add(int64_t row, int64_t column) {
    index[row * columns + count[row]] = static_cast<int32_t>(column);
    count[row] += 1;
  }
};

// -> partial key blocks of each query block (counts, indices), full ones, then both transposed.
std::vector<at::Tensor> block_lists(const at::Tensor& layout, int64_t block, int64_t first_query) {
  check_block(layout, block, first_query);
  const std::vector<KeyRun> runs = key_runs(layout);
  const int64_t num_tokens = layout.size(1);
  const std::vector<int32_t> pairs = count_visible_pairs(
      runs, static_cast<int32_t>(num_tokens), static_cast<int32_t>(block), static_cast<int32_t>(first_query));
  const int64_t k_blocks = (num_tokens + block - 1) / block;
  const int64_t q_blocks = k_blocks - first_query / block;
  BlockList partial(q_blocks, k_blocks);
  BlockList full(q_blocks, k_blocks);
  BlockList partial_of_key(k_blocks, q_blocks);
  BlockList full_of_key(k_blocks, q_blocks);
  for (int64_t q = 0; q < q_blocks; ++q) {
    for (int64_t k = 0; k <= q + first_query / block; ++k) {
      const int64_t visible = pairs[q * k_blocks + k];
      if (visible == 0) continue;
      const bool is_full = visible == block * block;
      (is_full ? full : partial).add(q, k);
      (is_full ? full_of_key : partial_of_key).add(k, q);
    }
  }
  return {partial.counts,        partial.indices,        full.counts,        full.indices,
          partial_of_key.counts, partial_of_key.indices, full_of_key.counts, full_of_key.indices};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(npr, library) {
  library.def("attention_plan(Tensor layout, int first_query=0) -> Tensor");
  library.def("block_lists(Tensor layout, int block, int first_query=0) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(npr, CPU, library) {
  library.impl("attention_plan", &attention_plan);
  library.impl("block_lists", &block_lists);
}

}  // namespace npr
