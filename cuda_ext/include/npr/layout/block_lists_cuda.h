// Block lists on the GPU: launcher only, raw pointers and a stream. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace npr {

// The rows of a layout that visibility needs, on the device.
struct VisibilityArrays {
  const int32_t* hidden_from;
  const int32_t* hidden_until;
  const int32_t* sequence_end;
  int32_t num_tokens;
  int32_t first_query;  // a multiple of the block
};

// Counts [rows] and indices [rows, columns] of the tiles in one direction; what lies beyond a row's count is zero.
struct BlockListArrays {
  int32_t* partial_counts;
  int32_t* partial_indices;
  int32_t* full_counts;
  int32_t* full_indices;
};

constexpr int32_t kMaxBlockColumns = 1 << 15;  // tiles of a row: a byte each in shared memory

// Lists of every query block (`of_queries`: rows are query blocks, columns key blocks) and of every key block
// (`of_keys`). At most kMaxBlockColumns blocks. Errors are cudaGetLastError's.
cudaError_t launch_block_lists(const VisibilityArrays& layout, int32_t block, const BlockListArrays& of_queries,
                               const BlockListArrays& of_keys, cudaStream_t stream);

}  // namespace npr
