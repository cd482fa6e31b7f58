// npr::rms_norm and npr::silu_mul with their gradients, and npr::split_heads, on the CPU, around npr/decoder_rows.h.
#include "npr/decoder_rows.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "storage_type.h"

namespace npr {
namespace {

// Below this many elements a thread costs more than it helps.
constexpr int64_t kElementsPerThread = 1 << 14;

template <typename Row>
void for_each_row(int64_t num_rows, int64_t elements_per_row, const Row& row) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_per_row));
  at::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) row(t);
  });
}

template <typename Stored>
const Stored* read(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<const Stored*>(tensor.const_data_ptr()) : nullptr;
}
template <typename Stored>
Stored* write(at::Tensor& tensor) {
  return static_cast<Stored*>(tensor.mutable_data_ptr());
}

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
  with_storage_type(x.scalar_type(), "rms_norm", [&]<typename Stored>(Stored) {
    const Stored* from = read<Stored>(rows);
    const Stored* factor = read<Stored>(scale);
    Stored* to = write<Stored>(output);
    const int64_t size = x.size(1);
    for_each_row(x.size(0), size, [=](int64_t t) { rms_norm_row(from + t * size, factor, to + t * size, size, eps); });
  });
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
  const int64_t rows_per_run = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, size));
  const int64_t runs = (num_rows + rows_per_run - 1) / rows_per_run;
  at::Tensor x_gradient = at::empty_like(rows);
  at::Tensor parts;
  with_storage_type(x.scalar_type(), "rms_norm_backward", [&]<typename Stored>(Stored) {
    using T = ComputeOf<Stored>;
    parts = at::zeros({runs, size}, x.options().dtype(sizeof(T) == 8 ? at::kDouble : at::kFloat));
    const Stored* from = read<Stored>(rows);
    const Stored* factor = read<Stored>(scale);
    const Stored* above = read<Stored>(given);
    Stored* to = write<Stored>(x_gradient);
    T* sums = static_cast<T*>(parts.mutable_data_ptr());
    at::parallel_for(0, runs, 1, [=](int64_t begin, int64_t end) {
      for (int64_t run = begin; run < end; ++run) {
        const int64_t last = std::min(num_rows, (run + 1) * rows_per_run);
        for (int64_t t = run * rows_per_run; t < last; ++t) {
          rms_norm_backward_row(from + t * size, factor, above + t * size, to + t * size, sums + run * size, size, eps);
        }
      }
    });
  });
  return {x_gradient, parts.sum(0).to(weight.scalar_type())};
}

at::Tensor silu_mul(const at::Tensor& gate_up) {
  TORCH_CHECK_VALUE(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up must be [T, 2F], not ", gate_up.sizes());
  const at::Tensor rows = gate_up.contiguous();
  const int64_t size = gate_up.size(1) / 2;
  at::Tensor output = at::empty({gate_up.size(0), size}, gate_up.options());
  with_storage_type(gate_up.scalar_type(), "silu_mul", [&]<typename Stored>(Stored) {
    const Stored* from = read<Stored>(rows);
    Stored* to = write<Stored>(output);
    for_each_row(gate_up.size(0), 2 * size, [=](int64_t t) { silu_mul_row(from + t * 2 * size, to + t * size, size); });
  });
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
  const int64_t size = gradient.size(1);
  at::Tensor output = at::empty_like(rows);
  with_storage_type(gate_up.scalar_type(), "silu_mul_backward", [&]<typename Stored>(Stored) {
    const Stored* from = read<Stored>(rows);
    const Stored* above = read<Stored>(given);
    Stored* to = write<Stored>(output);
    for_each_row(rows.size(0), 2 * size, [=](int64_t t) {
      silu_mul_backward_row(from + t * 2 * size, above + t * size, to + t * 2 * size, size);
    });
  });
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
  with_storage_type(qkv.scalar_type(), "split_heads", [&]<typename Stored>(Stored) {
    const Stored* from = read<Stored>(rows);
    const Stored* norm_q = read<Stored>(scale_q);
    const Stored* norm_k = read<Stored>(scale_k);
    const Stored* all_cos = read<Stored>(cosines);
    const Stored* all_sin = read<Stored>(sines);
    const int32_t* position_of = position.const_data_ptr<int32_t>();
    const int32_t* slot_of = slot.const_data_ptr<int32_t>();
    Stored* q = write<Stored>(output);
    Stored* k = write<Stored>(k_cache);
    Stored* v = write<Stored>(v_cache);
    const int size = static_cast<int>(dim);
    for_each_row(tokens, qkv.size(1), [=](int64_t t) {
      const Stored* c = all_cos + int64_t{position_of[t]} * (dim / 2);
      const Stored* s = all_sin + int64_t{position_of[t]} * (dim / 2);
      const Stored* head = from + t * groups * (queries + 2) * dim;
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t n = 0; n < queries; ++n, head += dim) {
          norm_and_rotate_row(head, norm_q, c, s, q + ((t * groups + g) * queries + n) * dim, size, eps);
        }
        const int64_t cached = (int64_t{slot_of[t]} * groups + g) * dim;
        norm_and_rotate_row(head, norm_k, c, s, k + cached, size, eps);
        head += dim;
        std::copy_n(head, dim, v + cached);
        head += dim;
      }
    });
  });
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
