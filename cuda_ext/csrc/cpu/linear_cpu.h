// npr::linear at one level, around npr/linear.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "npr/linear.h"

NPR_ISA_BEGIN

// Below this many products a thread costs more than it helps.
constexpr int64_t kProductsPerThread = 1 << 16;
// Up to this many rows dot products are faster (measured on a Zen 5 core, 96 to 1536 features).
constexpr int64_t kMostDotRows = 8;

// work(begin, end) over ranges of outputs that begin at multiples of `step`.
template <typename Work>
void split_outputs(int64_t outputs, int64_t step, int64_t products_per_output, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kProductsPerThread / std::max<int64_t>(1, products_per_output * step));
  at::parallel_for(0, (outputs + step - 1) / step, grain,
                   [&](int64_t begin, int64_t end) { work(begin * step, std::min(end * step, outputs)); });
}

template <typename Products>
void linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& output) {
  using Stored = typename Products::Stored;
  using T = typename Products::Sum;
  const LinearJob<Stored> job{static_cast<const Stored*>(x.const_data_ptr()),
                              static_cast<const Stored*>(weight.const_data_ptr()),
                              bias.defined() ? static_cast<const Stored*>(bias.const_data_ptr()) : nullptr,
                              static_cast<Stored*>(output.mutable_data_ptr()),
                              x.size(0),
                              x.size(1),
                              weight.size(0)};
  if (job.rows <= kMostDotRows) {
    const DotLinear<Products> dots(job);
    split_outputs(job.out_features, 16, x.numel(), [&](int64_t begin, int64_t end) { dots.run(begin, end); });
    return;
  }
  const PanelLinear<Products> panels(job);
  const at::Tensor scratch = at::empty({panels.scratch_size()}, x.options().dtype(c10::CppTypeToScalarType<T>::value));
  T* packed = scratch.mutable_data_ptr<T>();
  at::parallel_for(0, panels.num_panels(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) panels.pack(panel, packed);
  });
  split_outputs(job.out_features, PanelLinear<Products>::kOutputs, x.numel(),
                [&](int64_t begin, int64_t end) { panels.run(packed, begin, end); });
}

NPR_ISA_END
