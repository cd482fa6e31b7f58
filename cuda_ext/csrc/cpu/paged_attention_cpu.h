// npr::paged_attention at one level, around npr/paged_attention.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "npr/paged_attention.h"
#include "tasks.h"

NPR_ISA_BEGIN

template <typename Products>
void paged_attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                     const at::Tensor& block_tables, const at::Tensor& rows, const at::Tensor& lengths,
                     const std::vector<TokenRun>& runs, double scale, const at::Tensor& output) {
  using Stored = typename Products::Stored;
  const int num_kv_heads = static_cast<int>(k_cache.size(1));
  const PagedAttention<Stored> job{static_cast<const Stored*>(q.const_data_ptr()),
                                   static_cast<const Stored*>(k_cache.const_data_ptr()),
                                   static_cast<const Stored*>(v_cache.const_data_ptr()),
                                   static_cast<Stored*>(output.mutable_data_ptr()),
                                   block_tables.const_data_ptr<int32_t>(),
                                   rows.const_data_ptr<int32_t>(),
                                   lengths.const_data_ptr<int32_t>(),
                                   block_tables.size(1),
                                   static_cast<int>(q.size(1)),
                                   num_kv_heads,
                                   static_cast<int>(q.size(2)),
                                   static_cast<typename Products::Sum>(scale)};
  run_tasks(static_cast<int64_t>(runs.size()) * num_kv_heads, [&] {
    return [&job, &runs, num_kv_heads, task = std::make_unique<PagedAttentionTask<Products>>()](int64_t index) {
      task->run(job, runs[index / num_kv_heads], static_cast<int>(index % num_kv_heads));
    };
  });
}

NPR_ISA_END
