// Instruction sets. A source chooses a level before it includes anything (#define NPR_ISA_AVX512); without a choice it
// gets the base: x86-64-v3, or what the compiler takes for any processor of its kind.
//
// Kernels stand between NPR_ISA_BEGIN and NPR_ISA_END: they are compiled once for each level, for its target and into a
// namespace of its own (npr::base, npr::avx512, npr::avx512_bf16). Everything else, templates of the standard library
// among it, is compiled for the base, whichever source includes it. So of equal functions in several objects, of which
// the linker keeps any, none needs more than the base; tests/kernels/test_isa.py reads the machine code.
#pragma once

// GCC alone applies a target to lambdas and templates, too. Other compilers and processors have the base.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NPR_HAS_AVX512 1
#else
#define NPR_HAS_AVX512 0
#endif

#if defined(NPR_ISA_AVX512_BF16)
#define NPR_ISA avx512_bf16
#define NPR_ISA_FEATURES "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16"
#define NPR_VECTOR_BYTES 64
#elif defined(NPR_ISA_AVX512)
#define NPR_ISA avx512
#define NPR_ISA_FEATURES "avx512f,avx512bw,avx512cd,avx512dq,avx512vl"
#define NPR_VECTOR_BYTES 64
#else
#define NPR_ISA base
#if defined(__AVX__)
#define NPR_VECTOR_BYTES 32
#else
#define NPR_VECTOR_BYTES 16
#endif
#endif

#define NPR_PRAGMA_OF(text) _Pragma(#text)
#define NPR_PRAGMA(text) NPR_PRAGMA_OF(text)
#if defined(NPR_ISA_FEATURES)
#define NPR_TARGET_BEGIN NPR_PRAGMA(GCC push_options) NPR_PRAGMA(GCC target(NPR_ISA_FEATURES))
#define NPR_TARGET_END NPR_PRAGMA(GCC pop_options)
#else
#define NPR_TARGET_BEGIN
#define NPR_TARGET_END
#endif

// clang-format off
#define NPR_ISA_BEGIN NPR_TARGET_BEGIN namespace npr { inline namespace NPR_ISA {
#define NPR_ISA_END }} NPR_TARGET_END
// clang-format on
