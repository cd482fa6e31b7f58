// npr::branch_layout on the GPU, around npr/layout/layout_cuda.h. ATen/cuda's own headers would ask for those of cuBLAS and cuSPARSE, which a
// machine with nvcc alone has not.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../layout_check.h"
#include "npr/layout/layout_cuda.h"

namespace npr {
namespace {

template <typename Token>
void launch(const at::Tensor& tokens, const at::Tensor& bounds, const at::Tensor& prompts, const at::Tensor& parents,
            const TagTable& tags, bool branching, const LayoutArrays& out, int32_t* verdicts) {
  const int64_t num_tokens = tokens.numel();
  const int64_t num_segments = prompts.numel();
  const at::Tensor scratch = at::empty({static_cast<int64_t>(layout_scratch_bytes(num_tokens, num_segments))},
                                       tokens.options().dtype(at::kByte));
  const LayoutInputs<Token> inputs{tokens.const_data_ptr<Token>(),
                                   bounds.const_data_ptr<int64_t>(),
                                   prompts.const_data_ptr<int64_t>(),
                                   parents.defined() ? parents.const_data_ptr<int64_t>() : nullptr,
                                   num_tokens,
                                   num_segments,
                                   tags,
                                   branching};
  C10_CUDA_CHECK(
      launch_branch_layout(inputs, out, verdicts, scratch.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

// As on the CPU; see csrc/layout_op.cpp. Nothing waits for the device.
std::tuple<at::Tensor, at::Tensor> branch_layout(const at::Tensor& token_ids, at::IntArrayRef tag_ids,
                                                 const at::Tensor& prompt_lengths, const at::Tensor& cu_seqlens,
                                                 const std::optional<at::Tensor>& parents, bool branching) {
  check_layout_inputs(token_ids, tag_ids, prompt_lengths, cu_seqlens, parents);
  const c10::cuda::CUDAGuard guard(token_ids.device());
  const at::Tensor tokens = token_ids.contiguous();
  const at::Tensor bounds = as_int64(cu_seqlens);
  const at::Tensor prompts = as_int64(prompt_lengths);
  const at::Tensor parent_ids = parents.has_value() ? as_int64(*parents) : at::Tensor();
  const int64_t num_tokens = tokens.numel();
  const auto options = token_ids.options().dtype(at::kInt);
  at::Tensor arrays = at::empty({6, num_tokens}, options);
  at::Tensor verdicts = at::empty({2, prompts.numel()}, options);
  const LayoutArrays out = layout_arrays(arrays);
  const TagTable tags = TagTable::make(tag_ids.data());
  int32_t* codes = verdicts.mutable_data_ptr<int32_t>();
  if (tokens.scalar_type() == at::kInt) {
    launch<int32_t>(tokens, bounds, prompts, parent_ids, tags, branching, out, codes);
  } else {
    launch<int64_t>(tokens, bounds, prompts, parent_ids, tags, branching, out, codes);
  }
  return {arrays, verdicts};
}

}  // namespace

TORCH_LIBRARY_IMPL(npr, CUDA, library) { library.impl("branch_layout", &branch_layout); }

}  // namespace npr
