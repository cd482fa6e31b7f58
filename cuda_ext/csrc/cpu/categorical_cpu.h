// npr::categorical at one level, around npr/categorical.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "npr/categorical.h"

NPR_ISA_BEGIN

constexpr int64_t kLogitsPerThread = 1 << 14;

template <typename Stored>
void categorical(const at::Tensor& logits, const at::Tensor& uniforms, const at::Tensor& temperatures,
                 const at::Tensor& indices, const at::Tensor& policy, const at::Tensor& sampler) {
  using T = ComputeOf<Stored>;
  const int64_t size = logits.size(1);
  const auto* from = static_cast<const Stored*>(logits.const_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / size);
  at::parallel_for(0, logits.size(0), grain, [&](int64_t begin, int64_t end) {
    LogitRow<Stored> row(size);
    for (int64_t i = begin; i < end; ++i) {
      const auto drawn = row.draw(from + i * size, uniforms.const_data_ptr<double>()[i],
                                  static_cast<T>(temperatures.const_data_ptr<float>()[i]));
      indices.mutable_data_ptr<int64_t>()[i] = drawn.index;
      policy.mutable_data_ptr<T>()[i] = drawn.policy;
      sampler.mutable_data_ptr<T>()[i] = drawn.sampler;
    }
  });
}

NPR_ISA_END
