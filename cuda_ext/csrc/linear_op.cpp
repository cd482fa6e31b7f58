// npr::linear on the CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>

#include "cpu/cpu_operators.h"

namespace npr {
namespace {

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
                    "x [T, C] and weight [D, C] do not fit: ", x.sizes(), ", ", weight.sizes());
  const at::Tensor rows = x.contiguous();
  const at::Tensor matrix = weight.contiguous();
  const at::Tensor offset = bias.has_value() ? bias->contiguous() : at::Tensor();
  TORCH_CHECK_VALUE(x.scalar_type() == weight.scalar_type(), "x and weight differ in type: ", x.scalar_type(), ", ",
                    weight.scalar_type());
  TORCH_CHECK_VALUE(!offset.defined() ||
                        (offset.scalar_type() == x.scalar_type() && offset.sizes() == at::IntArrayRef{weight.size(0)}),
                    "bias must be ", x.scalar_type(), " [", weight.size(0), "]");
  at::Tensor output = at::empty({x.size(0), weight.size(0)}, x.options());
  cpu_operators(x.scalar_type(), "linear").linear(rows, matrix, offset, output);
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(npr, library) { library.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"); }

TORCH_LIBRARY_IMPL(npr, CPU, library) { library.impl("linear", &linear); }

}  // namespace npr
