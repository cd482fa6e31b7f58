// From a tensor's type to the C++ type that it is stored in.
#pragma once

#include <ATen/ATen.h>

#include "npr/simd.h"

namespace npr {

// Calls `work` with a value of the storage type of `dtype`; ValueError in the operator's name for other types.
template <typename Work>
void with_storage_type(at::ScalarType dtype, const char* name, const Work& work) {
  switch (dtype) {
    case at::kFloat:
      return work(float{});
    case at::kDouble:
      return work(double{});
    case at::kBFloat16:
      return work(BFloat16{});
    default:
      TORCH_CHECK_VALUE(false, name, " computes in float32, float64 or bfloat16, not ", dtype);
  }
}

}  // namespace npr
