// npr::branch_layout on the CPU: tensors in, tensors out, around npr/layout/layout.h.
#include "npr/layout/layout.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <optional>
#include <tuple>
#include <vector>

#include "layout_check.h"

namespace npr {
namespace {

constexpr int64_t kTokensPerThread = int64_t{1} << 15;  // below this a second thread costs more than it gives

// Fresh memory costs a page fault every 4 KiB, which is more than laying out its tokens; large pages make that cheap.
void ask_for_large_pages(const at::Tensor& tensor) {
#ifdef __linux__
  constexpr uintptr_t kLargePage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = (begin + tensor.nbytes()) / kLargePage * kLargePage;
  if (first < last)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: refusal is no error
#else
  (void)tensor;
#endif
}

// -> (arrays int32 [6, T]: position_ids, hidden_from, hidden_until, sequence_end, predecessor, branch_ids;
//     verdicts int32 [2, n]: violation code, token index)
std::tuple<at::Tensor, at::Tensor> branch_layout(const at::Tensor& token_ids, at::IntArrayRef tag_ids,
                                                 const at::Tensor& prompt_lengths, const at::Tensor& cu_seqlens,
                                                 const std::optional<at::Tensor>& parents, bool branching) {
  check_layout_inputs(token_ids, tag_ids, prompt_lengths, cu_seqlens, parents);
  const int64_t num_segments = prompt_lengths.numel();
  const int64_t num_tokens = token_ids.numel();

  const at::Tensor tokens = token_ids.contiguous();
  const at::Tensor bounds = as_int64(cu_seqlens);
  const at::Tensor prompts = as_int64(prompt_lengths);
  const at::Tensor parent_ids = parents.has_value() ? as_int64(*parents) : at::Tensor();
  std::vector<Segment> segments(num_segments);
  make_segments(bounds.const_data_ptr<int64_t>(), prompts.const_data_ptr<int64_t>(),
                parent_ids.defined() ? parent_ids.const_data_ptr<int64_t>() : nullptr, num_segments, num_tokens,
                segments.data());

  const auto options = token_ids.options().dtype(at::kInt);
  at::Tensor arrays = at::empty({6, num_tokens}, options);
  ask_for_large_pages(arrays);
  at::Tensor verdicts = at::empty({2, num_segments}, options);
  const LayoutArrays out = layout_arrays(arrays);
  int32_t* codes = verdicts.mutable_data_ptr<int32_t>();
  const TagTable tags = TagTable::make(tag_ids.data());

  write_uncovered(out, segments.data(), num_segments, num_tokens);

  const auto lay_out = [&](const auto* ids) {
    const int64_t grain = std::max<int64_t>(1, kTokensPerThread * num_segments / std::max<int64_t>(num_tokens, 1));
    at::parallel_for(0, num_segments, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Verdict verdict = layout_segment(ids, segments[i], tags, branching, out);
        codes[i] = verdict.violation;
        codes[num_segments + i] = verdict.token_index;
      }
    });
  };
  if (tokens.scalar_type() == at::kInt) {
    lay_out(tokens.const_data_ptr<int32_t>());
  } else {
    lay_out(tokens.const_data_ptr<int64_t>());
  }
  return {arrays, verdicts};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(npr, library) {
  library.def(
      "branch_layout(Tensor token_ids, int[] tag_ids, Tensor prompt_lengths, Tensor cu_seqlens, Tensor? parents, "
      "bool branching) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(npr, CPU, library) { library.impl("branch_layout", &branch_layout); }

}  // namespace npr
