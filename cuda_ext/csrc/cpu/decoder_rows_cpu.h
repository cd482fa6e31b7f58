// npr::rms_norm and npr::silu_mul with their gradients, and npr::split_heads, at one level, around npr/decoder_rows.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "npr/decoder_rows.h"

NPR_ISA_BEGIN

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
Stored* write(const at::Tensor& tensor) {
  return static_cast<Stored*>(tensor.mutable_data_ptr());
}

template <typename Stored>
void rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& output) {
  const Stored* from = read<Stored>(x);
  const Stored* factor = read<Stored>(weight);
  Stored* to = write<Stored>(output);
  const int64_t size = x.size(1);
  for_each_row(x.size(0), size, [=](int64_t t) { rms_norm_row(from + t * size, factor, to + t * size, size, eps); });
}

template <typename Stored>
void rms_norm_backward(const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, double eps,
                       int64_t rows_per_run, const at::Tensor& x_gradient, const at::Tensor& weight_gradients) {
  using T = ComputeOf<Stored>;
  const int64_t num_rows = x.size(0);
  const int64_t size = x.size(1);
  const Stored* from = read<Stored>(x);
  const Stored* factor = read<Stored>(weight);
  const Stored* above = read<Stored>(gradient);
  Stored* to = write<Stored>(x_gradient);
  T* sums = static_cast<T*>(weight_gradients.mutable_data_ptr());
  at::parallel_for(0, weight_gradients.size(0), 1, [=](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t last = std::min(num_rows, (run + 1) * rows_per_run);
      for (int64_t t = run * rows_per_run; t < last; ++t) {
        rms_norm_backward_row(from + t * size, factor, above + t * size, to + t * size, sums + run * size, size, eps);
      }
    }
  });
}

template <typename Stored>
void silu_mul(const at::Tensor& gate_up, const at::Tensor& output) {
  const Stored* from = read<Stored>(gate_up);
  Stored* to = write<Stored>(output);
  const int64_t size = output.size(1);
  for_each_row(output.size(0), 2 * size, [=](int64_t t) { silu_mul_row(from + t * 2 * size, to + t * size, size); });
}

template <typename Stored>
void silu_mul_backward(const at::Tensor& gradient, const at::Tensor& gate_up, const at::Tensor& output) {
  const Stored* from = read<Stored>(gate_up);
  const Stored* above = read<Stored>(gradient);
  Stored* to = write<Stored>(output);
  const int64_t size = gradient.size(1);
  for_each_row(gradient.size(0), 2 * size, [=](int64_t t) {
    silu_mul_backward_row(from + t * 2 * size, above + t * size, to + t * 2 * size, size);
  });
}

// Keys and values of token t go to its slot of the caches.
template <typename Stored>
void split_heads(const at::Tensor& qkv, const at::Tensor& query_norm, const at::Tensor& key_norm, const at::Tensor& cos,
                 const at::Tensor& sin, const at::Tensor& positions, const at::Tensor& slots, double eps,
                 const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& output) {
  const int64_t groups = k_cache.size(1);
  const int64_t dim = k_cache.size(2);
  const int64_t queries = qkv.size(1) / (groups * dim) - 2;
  const Stored* from = read<Stored>(qkv);
  const Stored* norm_q = read<Stored>(query_norm);
  const Stored* norm_k = read<Stored>(key_norm);
  const Stored* all_cos = read<Stored>(cos);
  const Stored* all_sin = read<Stored>(sin);
  const int32_t* position_of = positions.const_data_ptr<int32_t>();
  const int32_t* slot_of = slots.const_data_ptr<int32_t>();
  Stored* q = write<Stored>(output);
  Stored* k = write<Stored>(k_cache);
  Stored* v = write<Stored>(v_cache);
  const int size = static_cast<int>(dim);
  for_each_row(qkv.size(0), qkv.size(1), [=](int64_t t) {
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
}

NPR_ISA_END
