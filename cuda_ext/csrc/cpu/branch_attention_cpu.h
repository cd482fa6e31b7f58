// npr::branch_attention_forward and _backward at one level, around npr/branch_attention.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <memory>

#include "npr/branch_attention.h"
#include "../plan_tensor.h"
#include "tasks.h"

NPR_ISA_BEGIN

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
void branch_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& plan,
                              double scale, const at::Tensor& output, const at::Tensor& log_sums) {
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
void branch_attention_backward(const at::Tensor& gradient, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const at::Tensor& output, const at::Tensor& log_sums,
                               const at::Tensor& plan, double scale, const at::Tensor& dq, const at::Tensor& dk,
                               const at::Tensor& dv) {
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

NPR_ISA_END
