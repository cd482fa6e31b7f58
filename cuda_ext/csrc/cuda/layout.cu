// Branch layout on the GPU: the arrays of npr/layout/layout.h, from the same UnitWalker.
//
//   segments_kernel   one block: safe bounds of all segments (make_segments)
//   layout_kernel     one block a segment
//       1. all threads   tokens -> ordered list of tags (ballots and a scan; tags are rare)
//       2. one thread    tags -> units, whose data is left at each unit's first token
//       3. all threads   every token copies from the first token of its unit (binary search)
//
// Phase 2 is serial, but over tags: some sixty for a response of 32k tokens.
#include "npr/layout/layout_cuda.h"

namespace npr {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kTokensPerThread = 8;
constexpr int kStaged = 1024;  // tags, units and segments that are held in shared memory at a time

// Sum of the `count`s of the threads before this one; `total` of all. Every thread of the block calls it.
__device__ int exclusive_sum(int count, int* total) {
  __shared__ int warp_sums[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int sum = count;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffU, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0;
  int all = 0;
#pragma unroll
  for (int other = 0; other < kWarps; ++other) {
    const int value = warp_sums[other];
    before += other < warp ? value : 0;
    all += value;
  }
  __syncthreads();
  *total = all;
  return before + sum - count;
}

__global__ void segments_kernel(const int64_t* cu_seqlens, const int64_t* prompt_lengths, const int64_t* parents,
                                int64_t num_segments, int64_t num_tokens, Segment* segments) {
  __shared__ int64_t bounds[kStaged + 1];
  __shared__ int64_t prompts[kStaged];
  __shared__ int64_t parent_ids[kStaged];
  const bool staged = num_segments <= kStaged;
  if (staged) {
    for (int64_t i = threadIdx.x; i <= num_segments; i += blockDim.x) {
      bounds[i] = cu_seqlens[i];
      if (i == num_segments) break;
      prompts[i] = prompt_lengths[i];
      parent_ids[i] = parents == nullptr ? -1 : parents[i];
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (staged) {
    make_segments(bounds, prompts, parent_ids, num_segments, num_tokens, segments);
  } else {
    make_segments(cu_seqlens, prompt_lengths, parents, num_segments, num_tokens, segments);
  }
}

// Leaves a unit's data at its first token and lists the first tokens.
struct FirstTokenWriter {
  const LayoutArrays& out;
  int32_t visible_end;
  int32_t* begins;
  int32_t* num_units;

  __device__ void unit(const LayoutUnit& unit, int32_t end) const {
    if (unit.begin == end) return;
    begins[(*num_units)++] = unit.begin;
    out.position_ids[unit.begin] = unit.position;
    out.predecessor[unit.begin] = unit.predecessor;
    out.branch_ids[unit.begin] = unit.branch_id;
    out.hidden_from[unit.begin] = unit.branch_id > 0 ? end : visible_end;
    out.hidden_until[unit.begin] = visible_end;
  }
  __device__ void join(int32_t first, int32_t join) const {
    for (int32_t i = *num_units - 1; i >= 0 && begins[i] >= first; --i) out.hidden_until[begins[i]] = join;
  }
};

// Indices of the tags among tokens [begin, end), in order; returns how many. Every thread of the block calls it.
template <typename Token>
__device__ int32_t list_tags(const Token* tokens, int32_t begin, int32_t end, const TagTable& tags, int32_t* list) {
  int32_t listed = 0;
  for (int32_t tile = begin; tile < end; tile += kThreads * kTokensPerThread) {
    const int32_t first = tile + static_cast<int32_t>(threadIdx.x) * kTokensPerThread;
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      if (first + i < end && tags.of(tokens[first + i]) != Tag::kNone) found |= 1U << i;
    }
    int total = 0;
    int32_t place = listed + exclusive_sum(__popc(found), &total);
    for (; found != 0; found &= found - 1) list[place++] = first + __ffs(static_cast<int>(found)) - 1;
    listed += total;
  }
  return listed;
}

// The last unit that begins at or before t.
__device__ int32_t unit_of(const int32_t* begins, int32_t num_units, int32_t t) {
  int32_t low = 0;
  int32_t high = num_units;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (begins[middle] <= t) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// A token that no segment covers is a sequence of its own, as a pad token is.
__device__ void write_lone_tokens(const LayoutArrays& out, int64_t begin, int64_t end) {
  for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
    const int32_t next = static_cast<int32_t>(t) + 1;
    out.position_ids[t] = 0;
    out.hidden_from[t] = out.hidden_until[t] = out.sequence_end[t] = next;
    out.predecessor[t] = -1;
    out.branch_ids[t] = 0;
  }
}

// `lists`: int32 [T + n]; the part of a segment holds first its tags, then, in their place, its units.
template <typename Token>
__global__ void __launch_bounds__(kThreads)
    layout_kernel(const Token* tokens, const Segment* segments, int64_t num_segments, int64_t num_tokens, TagTable tags,
                  bool branching, LayoutArrays out, int32_t* verdicts, int32_t* lists) {
  if (blockIdx.x == num_segments) {  // bounds that do not cover the row leave tokens at its ends
    write_lone_tokens(out, 0, num_segments == 0 ? num_tokens : segments[0].begin);
    write_lone_tokens(out, num_segments == 0 ? num_tokens : segments[num_segments - 1].end, num_tokens);
    return;
  }
  __shared__ int32_t staged[kStaged];
  __shared__ int8_t staged_tags[kStaged];
  __shared__ int32_t num_units;
  __shared__ bool going_on;
  const Segment segment = segments[blockIdx.x];
  int32_t* list = lists + segment.begin + blockIdx.x;
  const int32_t num_tags = branching ? list_tags(tokens, segment.prompt_end, segment.end, tags, list) : 0;

  if (threadIdx.x == 0) {
    num_units = 0;
    going_on = true;
  }
  UnitWalker walker(segment);
  const FirstTokenWriter writer{out, segment.visible_end, list, &num_units};
  for (int32_t start = 0; start < num_tags; start += kStaged) {
    __syncthreads();  // the list is written, the former part is walked
    if (!going_on) break;
    const int32_t count = min(kStaged, num_tags - start);
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) {
      staged[i] = list[start + i];
      staged_tags[i] = static_cast<int8_t>(tags.of(tokens[staged[i]]));
    }
    __syncthreads();
    if (threadIdx.x == 0) {  // a unit closes at a tag, so units overwrite only tags that were staged before
      for (int32_t i = 0; i < count && going_on; ++i) {
        going_on = walker.feed(static_cast<Tag>(staged_tags[i]), staged[i], writer);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const Verdict verdict = walker.finish(branching, writer);
    verdicts[blockIdx.x] = verdict.violation;
    verdicts[num_segments + blockIdx.x] = verdict.token_index;
  }
  __syncthreads();

  const bool few = num_units <= kStaged;
  if (few) {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < num_units; i += kThreads) staged[i] = list[i];
    __syncthreads();
  }
  for (int32_t t = segment.begin + static_cast<int32_t>(threadIdx.x); t < segment.end; t += kThreads) {
    const int32_t* begins = few ? staged : list;
    const int32_t first = begins[unit_of(begins, num_units, t)];
    out.sequence_end[t] = segment.visible_end;
    if (t == first) continue;
    out.position_ids[t] = out.position_ids[first] + (t - first);
    out.hidden_from[t] = out.hidden_from[first];
    out.hidden_until[t] = out.hidden_until[first];
    out.predecessor[t] = t - 1;
    out.branch_ids[t] = out.branch_ids[first];
  }
}

}  // namespace

size_t layout_scratch_bytes(int64_t num_tokens, int64_t num_segments) {
  const size_t segments = sizeof(Segment) * static_cast<size_t>(num_segments);
  return (segments + 15) / 16 * 16 + sizeof(int32_t) * static_cast<size_t>(num_tokens + num_segments);
}

template <typename Token>
cudaError_t launch_branch_layout(const LayoutInputs<Token>& inputs, const LayoutArrays& out, int32_t* verdicts,
                                 void* scratch, cudaStream_t stream) {
  auto* segments = static_cast<Segment*>(scratch);
  const size_t segment_bytes = (sizeof(Segment) * static_cast<size_t>(inputs.num_segments) + 15) / 16 * 16;
  auto* lists = reinterpret_cast<int32_t*>(static_cast<char*>(scratch) + segment_bytes);
  segments_kernel<<<1, 256, 0, stream>>>(inputs.cu_seqlens, inputs.prompt_lengths, inputs.parents, inputs.num_segments,
                                         inputs.num_tokens, segments);
  layout_kernel<<<static_cast<unsigned>(inputs.num_segments + 1), kThreads, 0, stream>>>(
      inputs.tokens, segments, inputs.num_segments, inputs.num_tokens, inputs.tags, inputs.branching, out, verdicts,
      lists);
  return cudaGetLastError();
}

template cudaError_t launch_branch_layout<int32_t>(const LayoutInputs<int32_t>&, const LayoutArrays&, int32_t*, void*,
                                                   cudaStream_t);
template cudaError_t launch_branch_layout<int64_t>(const LayoutInputs<int64_t>&, const LayoutArrays&, int32_t*, void*,
                                                   cudaStream_t);

}  // namespace npr
