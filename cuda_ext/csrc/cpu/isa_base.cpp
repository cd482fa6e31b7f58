// The operators for every processor of its kind; on x86-64 those of version 3 (AVX2, FMA, ...).
#include "isa_operators.h"

namespace npr {

CpuIsa base_isa() {
#if defined(__AVX2__)
  constexpr const char* kName = "AVX2";
#else
  constexpr const char* kName = "GENERIC";
#endif
  return {kName, operators_of<float>(), operators_of<double>(), operators_of<BFloat16>()};
}

}  // namespace npr
