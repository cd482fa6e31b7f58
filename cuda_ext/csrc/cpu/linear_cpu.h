// npr::linear at one level, around npr/linear.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "npr/linear.h"

NPR_ISA_BEGIN

// Below this many products a thread costs more than it helps.
constexpr int64_t kProductsPerThread = 1 << 16;
// Bytes of x that are transposed at a time: they stay in a core's cache while all of W passes by.
constexpr int64_t kPackedBytes = 1 << 18;

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
  if (job.rows <= FewRowsLinear<Products>::kMostRows) {
    const FewRowsLinear<Products> few(job);
    split_outputs(job.out_features, FewRowsLinear<Products>::kOutputs, x.numel(),
                  [&](int64_t begin, int64_t end) { few.run(begin, end); });
    return;
  }
  constexpr int64_t kPanelRows = PanelLinear<Products>::kMostRows;
  const int64_t row_bytes = std::max<int64_t>(1, job.in_features) * static_cast<int64_t>(sizeof(Stored));
  const int64_t most_rows = std::max<int64_t>(1, kPackedBytes / (row_bytes * kPanelRows)) * kPanelRows;
  at::Tensor scratch;
  for (int64_t first = 0; first < job.rows; first += most_rows) {
    LinearJob<Stored> part = job;
    part.x += first * job.in_features;
    part.output += first * job.out_features;
    part.rows = std::min(most_rows, job.rows - first);
    const PanelLinear<Products> panels(part);
    if (first == 0) scratch = at::empty({panels.scratch_size()}, x.options().dtype(c10::CppTypeToScalarType<T>::value));
    T* packed = scratch.mutable_data_ptr<T>();
    at::parallel_for(0, panels.num_panels(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) panels.pack(panel, packed);
    });
    split_outputs(job.out_features, PanelLinear<Products>::kOutputs, part.rows * job.in_features,
                  [&](int64_t begin, int64_t end) { panels.run(packed, begin, end); });
  }
}

NPR_ISA_END
