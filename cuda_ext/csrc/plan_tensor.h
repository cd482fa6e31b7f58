// An AttentionPlan as one int32 tensor, so that it is saved and passed like any other input.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstring>

#include "npr/layout/visibility.h"

namespace npr {

constexpr int64_t kPlanHeader = 5;  // tokens, first query, units, intervals, components

static_assert(sizeof(Unit) == 3 * sizeof(int32_t) && sizeof(Interval) == 2 * sizeof(int32_t));

inline at::Tensor plan_to_tensor(const AttentionPlan& plan) {
  const auto units = static_cast<int64_t>(plan.units.size());
  const auto intervals = static_cast<int64_t>(plan.intervals.size());
  const auto components = static_cast<int64_t>(plan.components.size());
  at::Tensor tensor = at::empty({kPlanHeader + 3 * units + 2 * intervals + components}, at::kInt);
  auto* to = tensor.mutable_data_ptr<int32_t>();
  const int32_t header[kPlanHeader] = {plan.num_tokens, plan.first_query, static_cast<int32_t>(units),
                                       static_cast<int32_t>(intervals), static_cast<int32_t>(components)};
  to = std::copy_n(header, kPlanHeader, to);
  to = std::copy_n(reinterpret_cast<const int32_t*>(plan.units.data()), 3 * units, to);
  to = std::copy_n(reinterpret_cast<const int32_t*>(plan.intervals.data()), 2 * intervals, to);
  std::copy_n(plan.components.data(), components, to);
  return tensor;
}

inline AttentionPlan plan_from_tensor(const at::Tensor& tensor, int64_t num_queries, int64_t num_tokens) {
  TORCH_CHECK_VALUE(
      tensor.dim() == 1 && tensor.scalar_type() == at::kInt && tensor.is_contiguous() && tensor.numel() >= kPlanHeader,
      "an attention plan comes from npr::attention_plan");
  const auto* from = tensor.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(from[0] == num_tokens && from[0] - from[1] == num_queries, "the layout has ", from[0], " tokens, ",
                    from[0] - from[1], " of them queries; the tensors have ", num_tokens, " and ", num_queries);
  const int64_t units = from[2];
  const int64_t intervals = from[3];
  const int64_t components = from[4];
  TORCH_CHECK_VALUE(tensor.numel() == kPlanHeader + 3 * units + 2 * intervals + components,
                    "an attention plan comes from npr::attention_plan");
  AttentionPlan plan{from[0], from[1], {}, {}, {}};
  plan.units.resize(units);
  plan.intervals.resize(intervals);
  plan.components.resize(components);
  from += kPlanHeader;
  std::memcpy(plan.units.data(), from, units * sizeof(Unit));
  from += 3 * units;
  std::memcpy(plan.intervals.data(), from, intervals * sizeof(Interval));
  from += 2 * intervals;
  std::memcpy(plan.components.data(), from, components * sizeof(int32_t));
  return plan;
}

}  // namespace npr
