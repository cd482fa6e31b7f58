// npr::rms_norm and npr::silu_mul with their gradients, and npr::split_heads, on the CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cpu/cpu_operators.h"
#include "npr/sizes.h"

namespace npr {
namespace {

constexpr int64_t kElementsPerRun = 1 << 14;  // of rows whose weight gradients are summed in a row

at::Tensor contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->contiguous() : at::Tensor();
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.sizes() == at::IntArrayRef{x.size(1)},
                    "x [T, D] and weight [D] do not fit: ", x.sizes(), ", ", weight.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == weight.scalar_type(), "x and weight differ in type: ", x.scalar_type(), ", ",
                    weight.scalar_type());
  const at::Tensor rows = x.contiguous();
  const at::Tensor scale = weight.contiguous();
  at::Tensor output = at::empty_like(rows);
  cpu_operators(x.scalar_type(), "rms_norm").rms_norm(rows, scale, eps, output);
  return output;
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& gradient, const at::Tensor& x,
                                                     const at::Tensor& weight, double eps) {
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.sizes() == at::IntArrayRef{x.size(1)} && gradient.sizes() == x.sizes(),
                    "gradient and x [T, D] and weight [D] do not fit: ", gradient.sizes(), ", ", x.sizes(), ", ",
                    weight.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == weight.scalar_type() && x.scalar_type() == gradient.scalar_type(),
                    "gradient, x and weight differ in type: ", gradient.scalar_type(), ", ", x.scalar_type(), ", ",
                    weight.scalar_type());
  const at::Tensor given = gradient.contiguous();
  const at::Tensor rows = x.contiguous();
  const at::Tensor scale = weight.contiguous();
  const int64_t num_rows = x.size(0);
  const int64_t size = x.size(1);
  // A part of the weight's gradient for every run of rows, summed in order: the same whichever thread comes first.
  const int64_t rows_per_run = std::max<int64_t>(1, kElementsPerRun / std::max<int64_t>(1, size));
  const int64_t runs = (num_rows + rows_per_run - 1) / rows_per_run;
  at::Tensor x_gradient = at::empty_like(rows);
  at::Tensor parts =
      at::zeros({runs, size}, x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  cpu_operators(x.scalar_type(), "rms_norm_backward")
      .rms_norm_backward(given, rows, scale, eps, rows_per_run, x_gradient, parts);
  return {x_gradient, parts.sum(0).to(weight.scalar_type())};
}

at::Tensor silu_mul(const at::Tensor& gate_up) {
  TORCH_CHECK_VALUE(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up must be [T, 2F], not ", gate_up.sizes());
  const at::Tensor rows = gate_up.contiguous();
  at::Tensor output = at::empty({gate_up.size(0), gate_up.size(1) / 2}, gate_up.options());
  cpu_operators(gate_up.scalar_type(), "silu_mul").silu_mul(rows, output);
  return output;
}

at::Tensor silu_mul_backward(const at::Tensor& gradient, const at::Tensor& gate_up) {
  TORCH_CHECK_VALUE(gate_up.dim() == 2 && gradient.dim() == 2 && gradient.size(0) == gate_up.size(0) &&
                        gate_up.size(1) == 2 * gradient.size(1),
                    "gradient [T, F] and gate_up [T, 2F] do not fit: ", gradient.sizes(), ", ", gate_up.sizes());
  TORCH_CHECK_VALUE(gradient.scalar_type() == gate_up.scalar_type(),
                    "gradient and gate_up differ in type: ", gradient.scalar_type(), ", ", gate_up.scalar_type());
  const at::Tensor given = gradient.contiguous();
  const at::Tensor rows = gate_up.contiguous();
  at::Tensor output = at::empty_like(rows);
  cpu_operators(gate_up.scalar_type(), "silu_mul_backward").silu_mul_backward(given, rows, output);
  return output;
}

at::Tensor split_heads(const at::Tensor& qkv, const std::optional<at::Tensor>& query_norm,
                       const std::optional<at::Tensor>& key_norm, const at::Tensor& cos, const at::Tensor& sin,
                       const at::Tensor& positions, const at::Tensor& slots, at::Tensor k_cache, at::Tensor v_cache,
                       double eps) {
  TORCH_CHECK_VALUE(
      k_cache.dim() == 3 && v_cache.sizes() == k_cache.sizes() && k_cache.is_contiguous() && v_cache.is_contiguous(),
      "caches must be contiguous and alike [S, G, H]: ", k_cache.sizes(), ", ", v_cache.sizes());
  const int64_t groups = k_cache.size(1);
  const int64_t dim = k_cache.size(2);
  TORCH_CHECK_VALUE(dim % 2 == 0 && dim <= kMaxRotatedDim, "a head has an even number of at most ", kMaxRotatedDim,
                    " dimensions, not ", dim);
  TORCH_CHECK_VALUE(
      qkv.dim() == 2 && groups > 0 && qkv.size(1) % (groups * dim) == 0 && qkv.size(1) / (groups * dim) > 2,
      "qkv [T, G * (N + 2) * H] does not fit caches ", k_cache.sizes(), ": ", qkv.sizes());
  TORCH_CHECK_VALUE(cos.dim() == 2 && cos.size(1) == dim / 2 && sin.sizes() == cos.sizes(),
                    "cos and sin must be [P, H / 2]: ", cos.sizes(), ", ", sin.sizes());
  const int64_t tokens = qkv.size(0);
  TORCH_CHECK_VALUE(positions.scalar_type() == at::kInt && positions.sizes() == at::IntArrayRef{tokens} &&
                        slots.scalar_type() == at::kInt && slots.sizes() == at::IntArrayRef{tokens},
                    "positions and slots must be int32 [T]");
  for (const auto& norm : {query_norm, key_norm}) {
    TORCH_CHECK_VALUE(
        !norm.has_value() || (norm->sizes() == at::IntArrayRef{dim} && norm->scalar_type() == qkv.scalar_type()),
        "the norm of heads must be [H] of qkv's type");
  }
  for (const auto& tensor : {cos, sin, k_cache, v_cache}) {
    TORCH_CHECK_VALUE(tensor.scalar_type() == qkv.scalar_type(), "cos, sin and caches must have qkv's type, ",
                      qkv.scalar_type(), ", not ", tensor.scalar_type());
  }
  const at::Tensor rows = qkv.contiguous();
  const at::Tensor scale_q = contiguous(query_norm);
  const at::Tensor scale_k = contiguous(key_norm);
  const at::Tensor cosines = cos.contiguous();
  const at::Tensor sines = sin.contiguous();
  const at::Tensor position = positions.contiguous();
  const at::Tensor slot = slots.contiguous();
  for (int64_t t = 0; t < tokens; ++t) {
    const int32_t at_position = position.const_data_ptr<int32_t>()[t];
    const int32_t in_slot = slot.const_data_ptr<int32_t>()[t];
    TORCH_CHECK_VALUE(at_position >= 0 && at_position < cos.size(0), "token ", t, " has position ", at_position,
                      ", the rotary table holds ", cos.size(0));
    TORCH_CHECK_VALUE(in_slot >= 0 && in_slot < k_cache.size(0), "token ", t, " has slot ", in_slot, " of a cache of ",
                      k_cache.size(0));
  }
  const int64_t queries = qkv.size(1) / (groups * dim) - 2;
  at::Tensor output = at::empty({tokens, groups * queries, dim}, qkv.options());
  cpu_operators(qkv.scalar_type(), "split_heads")
      .split_heads(rows, scale_q, scale_k, cosines, sines, position, slot, eps, k_cache, v_cache, output);
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(npr, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("rms_norm_backward(Tensor gradient, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  library.def("silu_mul(Tensor gate_up) -> Tensor");
  library.def("silu_mul_backward(Tensor gradient, Tensor gate_up) -> Tensor");
  library.def(
      "split_heads(Tensor qkv, Tensor? query_norm, Tensor? key_norm, Tensor cos, Tensor sin, Tensor positions, "
      "Tensor slots, Tensor(a!) k_cache, Tensor(b!) v_cache, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(npr, CPU, library) {
  library.impl("rms_norm", &rms_norm);
  library.impl("rms_norm_backward", &rms_norm_backward);
  library.impl("silu_mul", &silu_mul);
  library.impl("silu_mul_backward", &silu_mul_backward);
  library.impl("split_heads", &split_heads);
}

}  // namespace npr
