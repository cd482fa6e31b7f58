// npr::few_rows_linear on the CPU, around npr/few_rows_linear.h.
#include "npr/few_rows_linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>

namespace npr {
namespace {

// Below this many products a thread costs more than it helps.
constexpr int64_t kProductsPerThread = 1 << 16;
constexpr int64_t kOutputsPerTask = 16;

template <typename Stored>
void multiply(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::Tensor& output) {
  const FewRowsLinear<Stored> job{static_cast<const Stored*>(x.const_data_ptr()),
                                  static_cast<const Stored*>(weight.const_data_ptr()),
                                  bias.defined() ? static_cast<const Stored*>(bias.const_data_ptr()) : nullptr,
                                  static_cast<Stored*>(output.mutable_data_ptr()),
                                  x.size(0),
                                  x.size(1),
                                  weight.size(0)};
  const int64_t products_per_task = std::max<int64_t>(1, x.numel() * kOutputsPerTask);
  const int64_t num_tasks = (weight.size(0) + kOutputsPerTask - 1) / kOutputsPerTask;
  at::parallel_for(0, num_tasks, std::max<int64_t>(1, kProductsPerThread / products_per_task),
                   [&](int64_t begin, int64_t end) {
                     job.run(begin * kOutputsPerTask, std::min(end * kOutputsPerTask, weight.size(0)));
                   });
}

at::Tensor few_rows_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "x [T, C] and weight [D, C] do not fit: ",
                    x.sizes(), ", ", weight.sizes());
  const at::Tensor rows = x.contiguous();
  const at::Tensor matrix = weight.contiguous();
  const at::Tensor offset = bias.has_value() ? bias->contiguous() : at::Tensor();
  TORCH_CHECK_VALUE(x.scalar_type() == weight.scalar_type(), "x and weight differ in type: ", x.scalar_type(), ", ",
                    weight.scalar_type());
  TORCH_CHECK_VALUE(!offset.defined() || (offset.scalar_type() == x.scalar_type() &&
                                          offset.sizes() == at::IntArrayRef{weight.size(0)}),
                    "bias must be ", x.scalar_type(), " [", weight.size(0), "]");
  at::Tensor output = at::empty({x.size(0), weight.size(0)}, x.options());
  switch (x.scalar_type()) {
    case at::kFloat:
      multiply<float>(rows, matrix, offset, output);
      break;
    case at::kDouble:
      multiply<double>(rows, matrix, offset, output);
      break;
    case at::kBFloat16:
      multiply<BFloat16>(rows, matrix, offset, output);
      break;
    default:
      TORCH_CHECK_VALUE(false, "few_rows_linear computes in float32, float64 or bfloat16, not ", x.scalar_type());
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(npr, library) {
  library.def("few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(npr, CPU, library) { library.impl("few_rows_linear", &few_rows_linear); }

}  // namespace npr
