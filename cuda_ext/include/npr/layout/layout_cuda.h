// Branch layout of a packed row on the GPU: two launches, no host synchronisation. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "npr/layout/layout_units.h"

namespace npr {

template <typename Token>
struct LayoutInputs {
  const Token* tokens;            // [T]
  const int64_t* cu_seqlens;      // [n + 1]
  const int64_t* prompt_lengths;  // [n]
  const int64_t* parents;         // [n] or null
  int64_t num_tokens;
  int64_t num_segments;
  TagTable tags;
  bool branching;
};

// Device memory that a launch needs beside its outputs; any content, aligned to 16 bytes.
size_t layout_scratch_bytes(int64_t num_tokens, int64_t num_segments);

// `verdicts` int32 [2, n]: violation code, token index. All pointers are to device memory; errors are
// cudaGetLastError's.
template <typename Token>
cudaError_t launch_branch_layout(const LayoutInputs<Token>& inputs, const LayoutArrays& out, int32_t* verdicts,
                                 void* scratch, cudaStream_t stream);

}  // namespace npr
