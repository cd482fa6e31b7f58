// npr::categorical on the CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/cpu_operators.h"

namespace npr {
namespace {

// -> indices, log-probabilities at temperature 1 and at the given temperatures, each [S].
std::tuple<at::Tensor, at::Tensor, at::Tensor> categorical(const at::Tensor& logits, const at::Tensor& uniforms,
                                                           const at::Tensor& temperatures) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0, "logits must be [S, V], not ", logits.sizes());
  TORCH_CHECK_VALUE(uniforms.scalar_type() == at::kDouble && uniforms.sizes() == at::IntArrayRef{logits.size(0)},
                    "uniforms must be float64 [S]");
  TORCH_CHECK_VALUE(temperatures.scalar_type() == at::kFloat && temperatures.sizes() == uniforms.sizes(),
                    "temperatures must be float32 [S]");
  const at::Tensor rows = logits.contiguous();
  const at::Tensor uniform = uniforms.contiguous();
  const at::Tensor temperature = temperatures.contiguous();
  at::Tensor indices = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));
  const auto type = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor policy = at::empty({logits.size(0)}, logits.options().dtype(type));
  at::Tensor sampler = at::empty_like(policy);
  cpu_operators(logits.scalar_type(), "categorical").categorical(rows, uniform, temperature, indices, policy, sampler);
  return {indices, policy, sampler};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(npr, library) {
  library.def("categorical(Tensor logits, Tensor uniforms, Tensor temperatures) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(npr, CPU, library) { library.impl("categorical", &categorical); }

}  // namespace npr
