// Which instruction set is in use: the best that this processor has, or another one that npr::use_cpu_isa names.
#include "cpu_operators.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <vector>

namespace npr {
namespace {

// All that were compiled and that this processor has, each better than those before it.
const std::vector<CpuIsa>& isas() {
  static const std::vector<CpuIsa> known = [] {
    std::vector<CpuIsa> found{base_isa()};
#if NPR_HAS_AVX512
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512) found.push_back(avx512_isa());
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(avx512_bf16_isa());
#endif
    return found;
  }();
  return known;
}

const CpuIsa*& in_use() {
  static const CpuIsa* isa = &isas().back();
  return isa;
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuIsa& isa : isas()) names.emplace_back(isa.name);
  return names;
}

std::string cpu_isa() { return in_use()->name; }

void use_cpu_isa(std::string_view name) {
  for (const CpuIsa& isa : isas()) {
    if (isa.name != name) continue;
    in_use() = &isa;
    return;
  }
  TORCH_CHECK_VALUE(false, "this processor, or this build, has no instruction set ", name);
}

}  // namespace

const CpuOperators& cpu_operators(at::ScalarType type, const char* name) {
  const CpuIsa& isa = *in_use();
  switch (type) {
    case at::kFloat:
      return isa.float32;
    case at::kDouble:
      return isa.float64;
    case at::kBFloat16:
      return isa.bfloat16;
    default:
      TORCH_CHECK_VALUE(false, name, " computes in float32, float64 or bfloat16, not ", type);
  }
}

}  // namespace npr

TORCH_LIBRARY_FRAGMENT(npr, library) {
  library.def("cpu_isas() -> str[]", &npr::cpu_isas);
  library.def("cpu_isa() -> str", &npr::cpu_isa);
  library.def("use_cpu_isa(str name) -> ()", &npr::use_cpu_isa);
}
