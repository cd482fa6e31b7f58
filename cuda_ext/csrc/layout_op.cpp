// npr::branch_layout on the CPU: tensors in, tensors out, around npr/layout.h.
#include "npr/layout.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <optional>
#include <tuple>
#include <vector>

namespace npr {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 30;        // token indices and positions are int32
constexpr int64_t kTokensPerThread = int64_t{1} << 15;  // below this a second thread costs more than it gives

void check_vector(const at::Tensor& tensor, const char* name, int64_t length) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && (length < 0 || tensor.numel() == length), name, " must be a vector",
                    length < 0 ? std::string() : " of " + std::to_string(length), ", not of shape ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong, name,
                    " must be int32 or int64, not ", tensor.scalar_type());
}

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

at::Tensor as_int64(const at::Tensor& tensor) { return tensor.to(at::kLong).contiguous(); }

// -> (arrays int32 [6, T]: position_ids, hidden_from, hidden_until, sequence_end, predecessor, branch_ids;
//     verdicts int32 [2, n]: violation code, token index)
std::tuple<at::Tensor, at::Tensor> branch_layout(const at::Tensor& token_ids, at::IntArrayRef tag_ids,
                                                 const at::Tensor& prompt_lengths, const at::Tensor& cu_seqlens,
                                                 const std::optional<at::Tensor>& parents, bool branching) {
  check_vector(token_ids, "token_ids", -1);
  check_vector(prompt_lengths, "prompt_lengths", -1);
  const int64_t num_segments = prompt_lengths.numel();
  check_vector(cu_seqlens, "cu_seqlens", num_segments + 1);
  if (parents.has_value()) check_vector(*parents, "parents", num_segments);
  TORCH_CHECK_VALUE(tag_ids.size() == kNumTags, "expected ", kNumTags, " tag ids, not ", tag_ids.size());
  const int64_t num_tokens = token_ids.numel();
  TORCH_CHECK_VALUE(num_tokens <= kMaxTokens, "a row holds at most ", kMaxTokens, " tokens, not ", num_tokens);

  const at::Tensor tokens = token_ids.contiguous();
  const at::Tensor bounds = as_int64(cu_seqlens);
  const at::Tensor prompts = as_int64(prompt_lengths);
  const at::Tensor parent_ids = parents.has_value() ? as_int64(*parents) : at::Tensor();
  const std::vector<Segment> segments = make_segments<int64_t>(
      bounds.const_data_ptr<int64_t>(), prompts.const_data_ptr<int64_t>(),
      parent_ids.defined() ? parent_ids.const_data_ptr<int64_t>() : nullptr, num_segments, num_tokens);

  const auto options = token_ids.options().dtype(at::kInt);
  at::Tensor arrays = at::empty({6, num_tokens}, options);
  ask_for_large_pages(arrays);
  at::Tensor verdicts = at::empty({2, num_segments}, options);
  int32_t* rows = arrays.mutable_data_ptr<int32_t>();
  const LayoutArrays out{rows,
                         rows + num_tokens,
                         rows + 2 * num_tokens,
                         rows + 3 * num_tokens,
                         rows + 4 * num_tokens,
                         rows + 5 * num_tokens};
  int32_t* codes = verdicts.mutable_data_ptr<int32_t>();
  const TagTable tags = TagTable::make(tag_ids.data());

  int32_t covered = 0;
  for (const Segment& segment : segments) {
    write_lone_tokens(out, covered, segment.begin);
    covered = segment.end;
  }
  write_lone_tokens(out, covered, static_cast<int32_t>(num_tokens));

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
