// Block lists on the GPU: which tiles of the mask are full, partial or absent, in both directions, in one launch.
//
//   one block of threads for the list of each query block, then of each key block
//       1. a warp a tile      its keys' visible queries are counted from the intervals: absent, partial or full
//       2. one warp           ordered compaction by ballots
//
// A tile costs `block` keys, not block x block pairs. Each list classifies its own tiles, so that no pass waits for
// another.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>

#include "npr/layout/block_lists_cuda.h"

namespace npr {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;

enum TileClass : uint8_t { kAbsent, kPartial, kFull };

__device__ int32_t length(int32_t begin, int32_t end) { return max(0, end - begin); }

// Queries in [q_begin, q_end) that see key k: from k to sequence_end, without [hidden_from, hidden_until).
__device__ int32_t visible_queries(const VisibilityArrays& layout, int32_t k, int32_t q_begin, int32_t q_end) {
  const int32_t begin = max(q_begin, k);
  const int32_t end = min(q_end, layout.sequence_end[k]);
  const int32_t hidden_begin = max(begin, layout.hidden_from[k]);
  return length(begin, end) - length(hidden_begin, min(end, layout.hidden_until[k]));
}

__device__ TileClass classify(const VisibilityArrays& layout, int32_t block, int32_t q_block, int32_t k_block,
                              const cg::thread_block_tile<32>& warp) {
  const int32_t q_begin = layout.first_query + q_block * block;
  const int32_t q_end = min(q_begin + block, layout.num_tokens);
  const int32_t k_begin = k_block * block;
  const int32_t k_end = min(k_begin + block, layout.num_tokens);
  if (k_begin >= q_end) return kAbsent;
  int32_t pairs = 0;
  for (int32_t k = k_begin + static_cast<int32_t>(warp.thread_rank()); k < k_end; k += 32) {
    pairs += visible_queries(layout, k, q_begin, q_end);
  }
  pairs = cg::reduce(warp, pairs, cg::plus<int32_t>());
  return pairs == 0 ? kAbsent : pairs == block * block ? kFull : kPartial;
}

// The columns of one class, in order; zeros fill the row. Returns their number in every lane.
__device__ int32_t list_columns(const uint8_t* classes, int32_t columns, TileClass wanted, int32_t* to,
                                const cg::thread_block_tile<32>& warp) {
  int32_t listed = 0;
  for (int32_t start = 0; start < columns; start += 32) {
    const int32_t column = start + static_cast<int32_t>(warp.thread_rank());
    const bool here = column < columns && classes[column] == wanted;
    const uint32_t found = warp.ballot(here);
    if (here) to[listed + __popc(found & ((1U << warp.thread_rank()) - 1U))] = column;
    listed += __popc(found);
  }
  for (int32_t rest = listed + static_cast<int32_t>(warp.thread_rank()); rest < columns; rest += 32) to[rest] = 0;
  return listed;
}

__global__ void __launch_bounds__(kThreads)
    block_lists_kernel(VisibilityArrays layout, int32_t block, int32_t q_blocks, int32_t k_blocks,
                       BlockListArrays of_queries, BlockListArrays of_keys) {
  extern __shared__ uint8_t classes[];
  const auto threads = cg::this_thread_block();
  const auto warp = cg::tiled_partition<32>(threads);
  const bool by_query = static_cast<int32_t>(blockIdx.x) < q_blocks;
  const int32_t row = static_cast<int32_t>(blockIdx.x) - (by_query ? 0 : q_blocks);
  const int32_t columns = by_query ? k_blocks : q_blocks;
  const BlockListArrays& lists = by_query ? of_queries : of_keys;

  const auto rank = static_cast<int32_t>(warp.meta_group_rank());
  for (int32_t column = rank; column < columns; column += static_cast<int32_t>(warp.meta_group_size())) {
    const TileClass found = classify(layout, block, by_query ? row : column, by_query ? column : row, warp);
    if (warp.thread_rank() == 0) classes[column] = found;
  }
  threads.sync();
  if (rank > 1) return;
  const TileClass wanted = rank == 0 ? kPartial : kFull;
  int32_t* counts = rank == 0 ? lists.partial_counts : lists.full_counts;
  int32_t* indices = rank == 0 ? lists.partial_indices : lists.full_indices;
  const int32_t listed = list_columns(classes, columns, wanted, indices + static_cast<int64_t>(row) * columns, warp);
  if (warp.thread_rank() == 0) counts[row] = listed;
}

}  // namespace

cudaError_t launch_block_lists(const VisibilityArrays& layout, int32_t block, const BlockListArrays& of_queries,
                               const BlockListArrays& of_keys, cudaStream_t stream) {
  const int32_t k_blocks = (layout.num_tokens + block - 1) / block;
  const int32_t q_blocks = k_blocks - layout.first_query / block;
  if (k_blocks == 0) return cudaSuccess;  // without queries the lists of the keys are empty, but they are written
  block_lists_kernel<<<static_cast<unsigned>(q_blocks + k_blocks), kThreads, static_cast<size_t>(k_blocks), stream>>>(
      layout, block, q_blocks, k_blocks, of_queries, of_keys);
  return cudaGetLastError();
}

}  // namespace npr
