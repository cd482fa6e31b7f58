// npr::categorical on the CPU, around npr/categorical.h.
#include "npr/categorical.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <memory>
#include <tuple>

namespace npr {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;

template <typename T>
void draw_rows(const at::Tensor& logits, const at::Tensor& uniforms, at::Tensor& tokens, at::Tensor& logprobs) {
  const int64_t size = logits.size(1);
  const T* rows = logits.const_data_ptr<T>();
  const double* uniform = uniforms.const_data_ptr<double>();
  int64_t* token = tokens.mutable_data_ptr<int64_t>();
  T* logprob = logprobs.mutable_data_ptr<T>();
  at::parallel_for(0, logits.size(0), std::max<int64_t>(1, kElementsPerThread / size), [&](int64_t begin, int64_t end) {
    const auto weights = std::make_unique<T[]>(static_cast<std::size_t>(size + kLanes<T>));
    for (int64_t row = begin; row < end; ++row) {
      const Draw<T> drawn = draw(rows + row * size, size, uniform[row], weights.get());
      token[row] = drawn.index;
      logprob[row] = drawn.logprob;
    }
  });
}

std::tuple<at::Tensor, at::Tensor> categorical(const at::Tensor& logits, const at::Tensor& uniforms) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0, "logits must be [S, V], not ", logits.sizes());
  TORCH_CHECK_VALUE(uniforms.scalar_type() == at::kDouble && uniforms.sizes() == at::IntArrayRef{logits.size(0)},
                    "uniforms must be float64 [S]");
  const at::Tensor rows = logits.contiguous();
  const at::Tensor uniform = uniforms.contiguous();
  at::Tensor tokens = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));
  at::Tensor logprobs = at::empty({logits.size(0)}, logits.options());
  switch (logits.scalar_type()) {
    case at::kFloat:
      draw_rows<float>(rows, uniform, tokens, logprobs);
      break;
    case at::kDouble:
      draw_rows<double>(rows, uniform, tokens, logprobs);
      break;
    default:
      TORCH_CHECK_VALUE(false, "categorical draws from float32 or float64, not ", logits.scalar_type());
  }
  return {tokens, logprobs};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(npr, library) { library.def("categorical(Tensor logits, Tensor uniforms) -> (Tensor, Tensor)"); }

TORCH_LIBRARY_IMPL(npr, CPU, library) { library.impl("categorical", &categorical); }

}  // namespace npr
