// npr::attention_plan and npr::block_lists on the CPU, around npr/visibility.h.
#include "npr/visibility.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <vector>

#include "plan_tensor.h"

namespace npr {
namespace {

std::vector<KeyRun> key_runs(const at::Tensor& layout) {
  TORCH_CHECK_VALUE(layout.dim() == 2 && layout.size(0) == 5 && layout.scalar_type() == at::kInt,
                    "a layout is int32 [5, T], not ", layout.scalar_type(), " ", layout.sizes());
  const at::Tensor arrays = layout.contiguous();
  const int64_t num_tokens = arrays.size(1);
  const int32_t* rows = arrays.const_data_ptr<int32_t>();
  std::vector<KeyRun> runs;
  TORCH_CHECK_VALUE(make_key_runs(rows + num_tokens, rows + 2 * num_tokens, rows + 3 * num_tokens,
                                  static_cast<int32_t>(num_tokens), runs),
                    "this int32 [5, ", num_tokens, "] tensor is no layout: its intervals leave their sequences");
  return runs;
}

at::Tensor attention_plan(const at::Tensor& layout) {
  return plan_to_tensor(make_attention_plan(key_runs(layout)), static_cast<int32_t>(layout.size(1)));
}

// Counts and indices of the tiles listed in one direction: [rows], [rows, columns] (the rest of a row is zero).
struct BlockList {
  at::Tensor counts;
  at::Tensor indices;
  int32_t* count;
  int32_t* index;
  int64_t num_blocks;

  explicit BlockList(int64_t blocks)
      : counts(at::zeros({blocks}, at::kInt)),
        indices(at::zeros({blocks, blocks}, at::kInt)),
        count(counts.mutable_data_ptr<int32_t>()),
        index(indices.mutable_data_ptr<int32_t>()),
        num_blocks(blocks) {}

  void add(int64_t row, int64_t column) {
    index[row * num_blocks + count[row]] = static_cast<int32_t>(column);
    count[row] += 1;
  }
};

// -> partial key blocks of each query block (counts, indices), full ones, then both transposed.
std::vector<at::Tensor> block_lists(const at::Tensor& layout, int64_t block) {
  TORCH_CHECK_VALUE(block > 0 && block <= 32768, "a block has 1 to 32768 tokens, not ", block);
  const std::vector<KeyRun> runs = key_runs(layout);
  const int64_t num_tokens = layout.size(1);
  const std::vector<int32_t> pairs =
      count_visible_pairs(runs, static_cast<int32_t>(num_tokens), static_cast<int32_t>(block));
  const int64_t num_blocks = (num_tokens + block - 1) / block;
  BlockList partial(num_blocks);
  BlockList full(num_blocks);
  BlockList partial_of_key(num_blocks);
  BlockList full_of_key(num_blocks);
  for (int64_t q = 0; q < num_blocks; ++q) {
    for (int64_t k = 0; k <= q; ++k) {
      const int64_t visible = pairs[q * num_blocks + k];
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
  library.def("attention_plan(Tensor layout) -> Tensor");
  library.def("block_lists(Tensor layout, int block) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(npr, CPU, library) {
  library.impl("attention_plan", &attention_plan);
  library.impl("block_lists", &block_lists);
}

}  // namespace npr
