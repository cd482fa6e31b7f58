// npr::branch_attention_forward and _backward on the CPU, around npr/branch_attention.h.
#include "npr/branch_attention.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <memory>
#include <tuple>

#include "plan_tensor.h"
#include "tasks.h"

namespace npr {
namespace {

void check_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK_VALUE(q.dim() == 3 && k.dim() == 3 && k.sizes() == v.sizes() && q.size(0) <= k.size(0) &&
                        q.size(2) == k.size(2) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    "q [Q, N, H], k and v [T, K, H] do not fit: ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK_VALUE(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                    "q, k and v differ in type: ", q.scalar_type(), ", ", k.scalar_type(), ", ", v.scalar_type());
  TORCH_CHECK_VALUE(q.scalar_type() == at::kFloat || q.scalar_type() == at::kDouble || q.scalar_type() == at::kBFloat16,
                    "branch_attention computes in float32, float64 or bfloat16, not ", q.scalar_type());
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

template <typename T>
HeadTensor<T> heads_of(const at::Tensor& tensor) {
  return {static_cast<T*>(const_cast<void*>(tensor.const_data_ptr())), tensor.stride(0), tensor.stride(1)};
}

template <typename T>
at::Tensor packed_blocks(const at::Tensor& tensor) {
  const int64_t num_blocks = (tensor.size(0) + kTileKeys - 1) / kTileKeys;
  const int64_t num_kv_heads = tensor.size(1);
  const int dim = static_cast<int>(tensor.size(2));
  at::Tensor packed = at::empty({num_kv_heads, num_blocks, dim, kTileStride}, tensor.options());
  T* to = static_cast<T*>(packed.mutable_data_ptr());
  const auto from = heads_of<const T>(tensor);
  const int64_t num_tokens = tensor.size(0);
  at::parallel_for(0, num_kv_heads * num_blocks, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_block<T>(from, i % num_blocks, static_cast<int>(i / num_blocks), num_tokens, dim,
                    to + i * dim * kTileStride);
    }
  });
  return packed;
}

template <typename T>
BranchAttention<T> make_job(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& output,
                            const at::Tensor& log_sums, const at::Tensor& packed_keys, const at::Tensor& plan,
                            double scale) {
  BranchAttention<T> job{};
  job.plan = plan_from_tensor(plan, q.size(0), k.size(0));
  job.group = static_cast<int>(q.size(1) / k.size(1));
  job.schedule = make_schedule(job.plan, job.group);
  job.q = heads_of<const T>(q);
  job.k = heads_of<const T>(k);
  job.v = heads_of<const T>(v);
  job.output = heads_of<T>(output);
  job.log_sums = static_cast<T*>(const_cast<void*>(log_sums.const_data_ptr()));
  job.packed_keys = static_cast<T*>(packed_keys.mutable_data_ptr());
  job.num_tokens = k.size(0);
  job.num_kv_heads = static_cast<int>(k.size(1));
  job.dim = static_cast<int>(q.size(2));
  job.scale = static_cast<T>(scale);
  return job;
}

template <typename T>
void run_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& output,
                 const at::Tensor& log_sums, const at::Tensor& plan, double scale) {
  const at::Tensor packed_keys = packed_blocks<T>(k);
  const BranchAttention<T> job = make_job<T>(q, k, v, output, log_sums, packed_keys, plan, scale);
  const auto num_ranges = static_cast<int64_t>(job.schedule.forward.size());
  run_tasks(num_ranges * job.num_kv_heads, [&] {
    return [&, task = std::make_unique<BranchAttentionTask<T>>()](int64_t index) {
      task->forward(job, job.schedule.forward[num_ranges - 1 - index / job.num_kv_heads],
                    static_cast<int>(index % job.num_kv_heads));
    };
  });
}

// Adds the partial gradients of sliced components to the result, slice by slice in order.
template <typename T>
void add_slices(const BranchAttention<T>& job, const at::Tensor& scratch, const at::Tensor& result) {
  const int64_t row = static_cast<int64_t>(job.num_kv_heads) * job.dim;
  const T* from = static_cast<const T*>(scratch.const_data_ptr());
  T* to = static_cast<T*>(result.mutable_data_ptr());
  for (const TileRange& range : job.schedule.backward) {
    if (range.scratch_token < 0) continue;
    const int64_t count = (range.end_token - range.first_token) * row;
    const T* partial = from + range.scratch_token * row;
    T* sum = to + range.first_token * row;
    at::parallel_for(0, count, 1 << 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sum[i] += partial[i];
    });
  }
}

template <typename T>
void run_backward(const at::Tensor& gradient, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& output, const at::Tensor& log_sums, const at::Tensor& plan, double scale,
                  const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) {
  const at::Tensor packed_keys = packed_blocks<T>(k);
  const at::Tensor packed_values = packed_blocks<T>(v);
  const BranchAttention<T> job = make_job<T>(q, k, v, output, log_sums, packed_keys, plan, scale);
  const at::Tensor scratch_k = at::empty({job.schedule.scratch_tokens, k.size(1), k.size(2)}, k.options());
  const at::Tensor scratch_v = at::empty_like(scratch_k);
  const BranchAttentionGradient<T> gradients{heads_of<const T>(gradient),
                                             heads_of<T>(dq),
                                             heads_of<T>(dk),
                                             heads_of<T>(dv),
                                             static_cast<T*>(packed_values.mutable_data_ptr()),
                                             static_cast<T*>(scratch_k.mutable_data_ptr()),
                                             static_cast<T*>(scratch_v.mutable_data_ptr())};
  const auto num_ranges = static_cast<int64_t>(job.schedule.backward.size());
  run_tasks(num_ranges * job.num_kv_heads, [&] {
    return [&, task = std::make_unique<BranchAttentionTask<T>>()](int64_t index) {
      task->backward(job, gradients, job.schedule.backward[num_ranges - 1 - index / job.num_kv_heads],
                     static_cast<int>(index % job.num_kv_heads));
    };
  });
  add_slices(job, scratch_k, dk);
  add_slices(job, scratch_v, dv);
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
  if (queries.scalar_type() == at::kDouble) {
    run_forward<double>(queries, keys, values, output, log_sums, plan, scale);
  } else {
    run_forward<float>(queries, keys, values, output, log_sums, plan, scale);
  }
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
  if (queries.scalar_type() == at::kDouble) {
    run_backward<double>(for_kernel(gradient), queries, keys, values, for_kernel(output), log_sums, plan, scale, dq, dk,
                         dv);
  } else {
    run_backward<float>(for_kernel(gradient), queries, keys, values, for_kernel(output), log_sums, plan, scale, dq, dk,
                        dv);
  }
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
