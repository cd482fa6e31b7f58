// npr::block_lists on the GPU, around npr/layout/block_lists_cuda.h; headers as in layout_cuda_op.cpp.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "../layout_check.h"
#include "npr/layout/block_lists_cuda.h"

namespace npr {
namespace {

// As on the CPU; see csrc/visibility_op.cpp. Nothing waits for the device, so the layout itself is not checked: arrays
// that are none give lists that are none, in bounds.
std::vector<at::Tensor> block_lists(const at::Tensor& layout, int64_t block, int64_t first_query) {
  check_block(layout, block, first_query);
  const int64_t num_tokens = layout.size(1);
  const int64_t k_blocks = (num_tokens + block - 1) / block;
  const int64_t q_blocks = k_blocks - first_query / block;
  TORCH_CHECK_VALUE(k_blocks <= kMaxBlockColumns, "a row has at most ", kMaxBlockColumns, " blocks, not ", k_blocks,
                    ": choose a block of more than ", block, " tokens");
  const c10::cuda::CUDAGuard guard(layout.device());
  const at::Tensor arrays = layout.contiguous();
  const int32_t* rows = arrays.const_data_ptr<int32_t>();
  std::vector<at::Tensor> lists;
  const auto add_lists = [&](int64_t height, int64_t width) {
    const std::size_t first = lists.size();
    for (int each = 0; each < 2; ++each) {
      lists.push_back(at::empty({height}, arrays.options()));
      lists.push_back(at::empty({height, width}, arrays.options()));
    }
    const auto data = [&](std::size_t i) { return lists[first + i].mutable_data_ptr<int32_t>(); };
    return BlockListArrays{data(0), data(1), data(2), data(3)};
  };
  const BlockListArrays of_queries = add_lists(q_blocks, k_blocks);
  const BlockListArrays of_keys = add_lists(k_blocks, q_blocks);
  const VisibilityArrays visibility{rows + num_tokens, rows + 2 * num_tokens, rows + 3 * num_tokens,
                                    static_cast<int32_t>(num_tokens), static_cast<int32_t>(first_query)};
  C10_CUDA_CHECK(launch_block_lists(visibility, static_cast<int32_t>(block), of_queries, of_keys,
                                    c10::cuda::getCurrentCUDAStream()));
  return lists;
}

}  // namespace

TORCH_LIBRARY_IMPL(npr, CUDA, library) { library.impl("block_lists", &block_lists); }

}  // namespace npr
