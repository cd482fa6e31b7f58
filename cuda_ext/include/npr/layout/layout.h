// Branch layout of a packed row on the CPU: one pass over the tokens, O(T) time, no allocation per token. Torch-free.
//
//   segments (cu_seqlens, parents) -> make_segments -> [UnitWalker per segment, in parallel] -> six int32 arrays
//
// The definition is cuda_ext/README.md, "Who sees whom".
#pragma once

#include <algorithm>
#include <cstdint>

#include "npr/layout/layout_units.h"

namespace npr {

// Tokens [begin, end) count up from `position`; nothing is hidden from later tokens of the sequence.
inline void write_unit(const LayoutArrays& out, int32_t begin, int32_t end, int32_t position, int32_t branch_id,
                       int32_t hidden_from, int32_t visible_end) {
  for (int32_t t = begin; t < end; ++t) {
    out.position_ids[t] = position + (t - begin);
    out.hidden_from[t] = hidden_from;
    out.hidden_until[t] = visible_end;
    out.sequence_end[t] = visible_end;
    out.predecessor[t] = t - 1;
    out.branch_ids[t] = branch_id;
  }
}

// A token that no segment covers: a sequence of its own, as a pad token is.
inline void write_lone_tokens(const LayoutArrays& out, int32_t begin, int32_t end) {
  for (int32_t t = begin; t < end; ++t) {
    write_unit(out, t, t + 1, 0, 0, t + 1, t + 1);
    out.predecessor[t] = -1;
  }
}

// The tokens that none of the segments covers.
inline void write_uncovered(const LayoutArrays& out, const Segment* segments, int64_t num_segments,
                            int64_t num_tokens) {
  int32_t covered = 0;
  for (int64_t i = 0; i < num_segments; ++i) {
    write_lone_tokens(out, covered, segments[i].begin);
    covered = segments[i].end;
  }
  write_lone_tokens(out, covered, static_cast<int32_t>(num_tokens));
}

// Writes units as they close.
struct ArrayWriter {
  const LayoutArrays& out;
  int32_t visible_end;

  void unit(const LayoutUnit& unit, int32_t end) const {
    const int32_t hidden_from = unit.branch_id > 0 ? end : visible_end;
    write_unit(out, unit.begin, end, unit.position, unit.branch_id, hidden_from, visible_end);
    if (unit.begin < end) out.predecessor[unit.begin] = unit.predecessor;
  }
  void join(int32_t first, int32_t join) const { std::fill(out.hidden_until + first, out.hidden_until + join, join); }
};

template <typename Token>
Verdict layout_segment(const Token* tokens, const Segment& segment, const TagTable& tags, bool branching,
                       const LayoutArrays& out) {
  const ArrayWriter writer{out, segment.visible_end};
  UnitWalker walker(segment);
  for (int32_t t = branching ? segment.prompt_end : segment.end; t < segment.end; ++t) {
    const Tag tag = tags.of(tokens[t]);
    if (tag != Tag::kNone && !walker.feed(tag, t, writer)) break;
  }
  return walker.finish(branching, writer);
}

}  // namespace npr
