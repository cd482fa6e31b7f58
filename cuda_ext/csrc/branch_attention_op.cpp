// npr::branch_attention_forward and _backward on the CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/cpu_operators.h"
#include "npr/sizes.h"

namespace npr {
namespace {

void check_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK_VALUE(q.dim() == 3 && k.dim() == 3 && k.sizes() == v.sizes() && q.size(0) <= k.size(0) &&
                        q.size(2) == k.size(2) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    "q [Q, N, H], k and v [T, K, H] do not fit: ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK_VALUE(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                    "q, k and v differ in type: ", q.scalar_type(), ", ", k.scalar_type(), ", ", v.scalar_type());
  TORCH_CHECK_VALUE(q.size(2) <= kMaxHeadDim, "a head has at most ", kMaxHeadDim, " dimensions, not ", q.size(2));
  TORCH_CHECK_VALUE(q.size(1) / k.size(1) <= kTileRows, "at most ", kTileRows, " query heads share a key head, not ",
                    q.size(1) / k.size(1));
}

constexpr int64_t kDimStep = 16;  // the kernel's heads are whole vectors; others are padded with zeros

// [T, heads, dim] as the kernel reads it: float32 or float64, dim contiguous and a multiple of 16.
at::Tensor for_kernel(const at::Tensor& tensor) {
  at::Tensor wide = tensor.scalar_type() == at::kBFloat16 ? tensor.to(at::kFloat) : tensor;
  const int64_t missing = (kDimStep - wide.size(2) % kDimStep) % kDimStep;
  if (missing > 0) wide = at::constant_pad_nd(wide, {0, missing});
  return wide.size(2) == 0 || wide.stride(2) == 1 ? wide : wide.contiguous();
}

// A result of the kernel in the shape and type of `like`.
at::Tensor from_kernel(const at::Tensor& tensor, const at::Tensor& like) {
  return tensor.narrow(2, 0, like.size(2)).to(like.scalar_type()).contiguous();
}

// -> output [Q, N, H], log of the softmax's denominators [Q, N] (float32, or float64 for float64)
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                           const at::Tensor& plan, double scale) {
  check_inputs(q, k, v);
  const at::Tensor queries = for_kernel(q);
  const at::Tensor keys = for_kernel(k);
  const at::Tensor values = for_kernel(v);
  const at::Tensor output = at::empty(queries.sizes(), queries.options());
  const at::Tensor log_sums = at::empty({q.size(0), q.size(1)}, queries.options());
  cpu_operators(q.scalar_type(), "branch_attention")
      .branch_attention_forward(queries, keys, values, plan, scale, output, log_sums);
  return {from_kernel(output, q), log_sums};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& gradient, const at::Tensor& q,
                                                        const at::Tensor& k, const at::Tensor& v,
                                                        const at::Tensor& output, const at::Tensor& log_sums,
                                                        const at::Tensor& plan, double scale) {
  check_inputs(q, k, v);
  TORCH_CHECK_VALUE(gradient.sizes() == q.sizes() && output.sizes() == q.sizes() && log_sums.dim() == 2 &&
                        log_sums.size(0) == q.size(0) && log_sums.size(1) == q.size(1) && log_sums.is_contiguous(),
                    "output, its gradient and the log-sums do not fit q ", q.sizes());
  const at::Tensor queries = for_kernel(q);
  const at::Tensor keys = for_kernel(k);
  const at::Tensor values = for_kernel(v);
  const at::Tensor dq = at::empty(queries.sizes(), queries.options());
  const at::Tensor dk = at::empty(keys.sizes(), keys.options());
  const at::Tensor dv = at::empty(keys.sizes(), keys.options());
  cpu_operators(q.scalar_type(), "branch_attention")
      .branch_attention_backward(for_kernel(gradient), queries, keys, values, for_kernel(output), log_sums, plan, scale,
                                 dq, dk, dv);
  return {from_kernel(dq, q), from_kernel(dk, k), from_kernel(dv, v)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(npr, library) {
  library.def("branch_attention_forward(Tensor q, Tensor k, Tensor v, Tensor plan, float scale) -> (Tensor, Tensor)");
  library.def(
      "branch_attention_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor output, Tensor log_sums, "
      "Tensor plan, float scale) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(npr, CPU, library) {
  library.impl("branch_attention_forward", &forward);
  library.impl("branch_attention_backward", &backward);
}

}  // namespace npr
