// Branch layout of a packed row on the CPU: one pass over the tokens, O(T) time, no allocation per token. Torch-free.
//
//   segments (cu_seqlens, parents) -> make_segments -> [layout_segment per segment, in parallel] -> six int32 arrays
//
// The definition is design/FORMAT.md: "Who sees whom", "Positions", "Who predicts whom".
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "npr/layout_rules.h"

namespace npr {

// int32 [T] each. A query q sees key k iff k <= q < sequence_end[k] and not hidden_from[k] <= q < hidden_until[k].
struct LayoutArrays {
  int32_t* position_ids;
  int32_t* hidden_from;
  int32_t* hidden_until;
  int32_t* sequence_end;
  int32_t* predecessor;
  int32_t* branch_ids;
};

// One sequence of the row, after its bounds have been made safe.
struct Segment {
  int32_t begin;
  int32_t end;
  int32_t prompt_end;         // tags are read from here on
  int32_t first_position;     // position of the first token
  int32_t first_predecessor;  // index that predicts the first token, or -1
  int32_t visible_end;        // `sequence_end` of its keys: own end, or the end of the group that shares this prompt
  int32_t status;
};

struct Verdict {
  int32_t violation;
  int32_t token_index;
};

// Bounds are made monotone and kept inside [0, num_tokens], so that any integers give safe, disjoint segments. A prompt
// is shared only by the responses that follow it directly: everything between a prompt and the end of its group sees
// it.
template <typename Index>
std::vector<Segment> make_segments(const Index* cu_seqlens, const Index* prompt_lengths, const Index* parents,
                                   int64_t num_segments, int64_t num_tokens) {
  std::vector<Segment> segments(num_segments);
  int64_t previous_end = 0;
  int64_t shared_prompt = -1;  // prompt of the group that is still growing
  for (int64_t i = 0; i < num_segments; ++i) {
    const int64_t wanted_begin = cu_seqlens[i];
    const int64_t wanted_end = cu_seqlens[i + 1];
    const int64_t begin = std::clamp<int64_t>(wanted_begin, previous_end, num_tokens);
    const int64_t end = std::clamp<int64_t>(wanted_end, begin, num_tokens);
    const bool last = i + 1 == num_segments;
    int32_t status = kOk;
    if (begin != wanted_begin || end != wanted_end || begin != previous_end || (last && end != num_tokens)) {
      status = kBadBounds;
    }
    const int64_t wanted_prompt = prompt_lengths[i];
    const int64_t prompt_length = std::clamp<int64_t>(wanted_prompt, 0, end - begin);
    if (status == kOk && prompt_length != wanted_prompt) status = kBadPromptLength;

    Segment segment{static_cast<int32_t>(begin),
                    static_cast<int32_t>(end),
                    static_cast<int32_t>(begin + prompt_length),
                    0,
                    -1,
                    static_cast<int32_t>(end),
                    status};
    const int64_t parent = parents == nullptr ? -1 : static_cast<int64_t>(parents[i]);
    if (parent == -1) {
      shared_prompt = segment.prompt_end == segment.end ? i : -1;
    } else if (parent == shared_prompt && parent >= 0) {
      Segment& prompt = segments[parent];
      segment.first_position = prompt.end - prompt.begin;
      segment.first_predecessor = prompt.end - 1;
      if (prompt.end == prompt.begin) segment.first_predecessor = -1;
      prompt.visible_end = segment.end;
    } else {
      if (status == kOk) segment.status = kBadParent;
      shared_prompt = -1;
    }
    segments[i] = segment;
    previous_end = end;
  }
  return segments;
}

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

template <typename Token>
Verdict layout_segment(const Token* tokens, const Segment& segment, const TagTable& tags, bool branching,
                       const LayoutArrays& out) {
  const int32_t end = segment.end;
  const int32_t visible_end = segment.visible_end;
  Machine machine;
  Verdict verdict{kOk, -1};
  int32_t unit_begin = segment.begin;
  int32_t unit_position = segment.first_position;
  int32_t unit_predecessor = segment.first_predecessor;
  int32_t fork = -1;           // index of `</guideline>` while its branches are open
  int32_t fork_position = 0;   // its position
  int32_t longest_branch = 0;  // tokens of the longest branch closed so far

  const auto close_unit = [&](int32_t unit_end, int32_t branch_id) {
    const int32_t hidden_from = branch_id > 0 ? unit_end : visible_end;
    write_unit(out, unit_begin, unit_end, unit_position, branch_id, hidden_from, visible_end);
    if (unit_begin < unit_end) out.predecessor[unit_begin] = unit_predecessor;
    unit_begin = unit_end;
  };
  const auto close_branch = [&](int32_t unit_end, int32_t branch_id) {
    longest_branch = std::max(longest_branch, unit_end - unit_begin);
    close_unit(unit_end, branch_id);
  };
  const auto join_at = [&](int32_t join, int32_t join_predecessor) {
    std::fill(out.hidden_until + fork + 1, out.hidden_until + join, join);
    unit_position = fork_position + longest_branch + 1;
    unit_predecessor = join_predecessor;
  };

  for (int32_t t = branching ? segment.prompt_end : end; t < end; ++t) {
    const Tag tag = tags.of(tokens[t]);
    if (tag == Tag::kNone) continue;
    const bool was_in_branch = machine.in_branch();
    const int32_t branch_id = machine.num_steps + 1;
    const Violation violation = machine.feed(tag);
    if (violation != kOk) {
      verdict = {violation, t};
      if (was_in_branch) {  // everything from t on is trunk: an early join, sampled right after t - 1
        close_branch(t, branch_id);
        join_at(t, t - 1);
      }
      machine = Machine{};
      break;
    }
    if (tag == Tag::kGuidelineEnd) {
      fork = t;
      fork_position = unit_position + (t - unit_begin);
      longest_branch = 0;
      close_unit(t + 1, 0);
      unit_position = fork_position + 1;
      unit_predecessor = fork;
    } else if (tag == Tag::kStepEnd) {
      close_branch(t + 1, branch_id);
      if (machine.state == State::kBeforeTakeaway) join_at(t + 1, -1);
    }
  }

  if (machine.in_branch()) {  // cut: the open branch ends with the sequence
    close_branch(end, machine.num_steps + 1);
    join_at(end, -1);
  } else {
    close_unit(end, 0);
  }
  if (verdict.violation == kOk && branching && machine.finish() != kOk) verdict = {machine.finish(), end};
  if (segment.status != kOk) verdict = {segment.status, segment.begin};
  return verdict;
}

}  // namespace npr
