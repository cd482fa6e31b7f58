// What npr::branch_layout does with its tensors on every device; nothing here reads device memory.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>

#include "npr/layout/layout_units.h"

namespace npr {

constexpr int64_t kMaxTokens = int64_t{1} << 30;  // token indices and positions are int32

inline void check_vector(const at::Tensor& tensor, const char* name, int64_t length) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && (length < 0 || tensor.numel() == length), name, " must be a vector",
                    length < 0 ? std::string() : " of " + std::to_string(length), ", not of shape ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong, name,
                    " must be int32 or int64, not ", tensor.scalar_type());
}

inline void check_layout_inputs(const at::Tensor& token_ids, at::IntArrayRef tag_ids, const at::Tensor& prompt_lengths,
                                const at::Tensor& cu_seqlens, const std::optional<at::Tensor>& parents) {
  check_vector(token_ids, "token_ids", -1);
  check_vector(prompt_lengths, "prompt_lengths", -1);
  check_vector(cu_seqlens, "cu_seqlens", prompt_lengths.numel() + 1);
  if (parents.has_value()) check_vector(*parents, "parents", prompt_lengths.numel());
  for (const at::Tensor& bounds : {prompt_lengths, cu_seqlens, parents.value_or(cu_seqlens)}) {
    TORCH_CHECK_VALUE(bounds.device() == token_ids.device(), "bounds must lie on ", token_ids.device(),
                      " as the tokens do, not on ", bounds.device());
  }
  TORCH_CHECK_VALUE(tag_ids.size() == kNumTags, "expected ", kNumTags, " tag ids, not ", tag_ids.size());
  TORCH_CHECK_VALUE(token_ids.numel() <= kMaxTokens, "a row holds at most ", kMaxTokens, " tokens, not ",
                    token_ids.numel());
}

inline void check_layout(const at::Tensor& layout) {
  TORCH_CHECK_VALUE(layout.dim() == 2 && layout.size(0) == 5 && layout.scalar_type() == at::kInt,
                    "a layout is int32 [5, T], not ", layout.scalar_type(), " ", layout.sizes());
}

inline void check_first_query(const at::Tensor& layout, int64_t first_query) {
  check_layout(layout);
  TORCH_CHECK_VALUE(first_query >= 0 && first_query <= layout.size(1), "the first query of ", layout.size(1),
                    " tokens cannot be ", first_query);
}

inline void check_block(const at::Tensor& layout, int64_t block, int64_t first_query) {
  check_first_query(layout, first_query);
  TORCH_CHECK_VALUE(block > 0 && block <= 32768, "a block has 1 to 32768 tokens, not ", block);
  TORCH_CHECK_VALUE(first_query % block == 0, "the first query must be a multiple of the block ", block, ", not ",
                    first_query);
}

// The rows of an int32 [6, T] tensor.
inline LayoutArrays layout_arrays(at::Tensor& arrays) {
  int32_t* rows = arrays.mutable_data_ptr<int32_t>();
  const int64_t size = arrays.size(1);
  return {rows, rows + size, rows + 2 * size, rows + 3 * size, rows + 4 * size, rows + 5 * size};
}

inline at::Tensor as_int64(const at::Tensor& tensor) { return tensor.to(at::kLong).contiguous(); }

}  // namespace npr
