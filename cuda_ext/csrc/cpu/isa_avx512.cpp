// The operators in AVX-512: vectors twice as wide, twice as many registers.
#define NPR_ISA_AVX512
#include "npr/isa.h"

#if NPR_HAS_AVX512
#include "isa_operators.h"

namespace npr {

CpuIsa avx512_isa() { return {"AVX512", operators_of<float>(), operators_of<double>(), operators_of<BFloat16>()}; }

}  // namespace npr
#endif
