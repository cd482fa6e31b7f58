// From the tags of a response to its units: runs of tokens that count up from one position and share who sees them.
// Torch-free and usable from host and device: the one place in C++ that knows positions, joins and predecessors.
//
// A unit is a stretch of the trunk, one branch or a join. The definition is cuda_ext/README.md, "Who sees whom".
#pragma once

#include <cstdint>

#include "npr/layout/layout_rules.h"

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

NPR_HOST_DEVICE inline int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

// Bounds are made monotone and kept inside [0, num_tokens], so that any integers give safe, disjoint segments. A prompt
// is shared only by the responses that follow it directly: everything between a prompt and the end of its group sees
// it.
template <typename Index>
NPR_HOST_DEVICE void make_segments(const Index* cu_seqlens, const Index* prompt_lengths, const Index* parents,
                                   int64_t num_segments, int64_t num_tokens, Segment* segments) {
  int64_t previous_end = 0;
  int64_t shared_prompt = -1;  // prompt of the group that is still growing
  for (int64_t i = 0; i < num_segments; ++i) {
    const int64_t wanted_begin = cu_seqlens[i];
    const int64_t wanted_end = cu_seqlens[i + 1];
    const int64_t begin = clamped(wanted_begin, previous_end, num_tokens);
    const int64_t end = clamped(wanted_end, begin, num_tokens);
    const bool last = i + 1 == num_segments;
    int32_t status = kOk;
    if (begin != wanted_begin || end != wanted_end || begin != previous_end || (last && end != num_tokens)) {
      status = kBadBounds;
    }
    const int64_t wanted_prompt = prompt_lengths[i];
    const int64_t prompt_length = clamped(wanted_prompt, 0, end - begin);
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
      segment.first_predecessor = prompt.end == prompt.begin ? -1 : prompt.end - 1;
      prompt.visible_end = segment.end;
    } else {
      if (status == kOk) segment.status = kBadParent;
      shared_prompt = -1;
    }
    segments[i] = segment;
    previous_end = end;
  }
}

struct Verdict {
  int32_t violation;
  int32_t token_index;
};

struct LayoutUnit {
  int32_t begin;
  int32_t position;     // of its first token
  int32_t predecessor;  // index that predicts its first token, or -1
  int32_t branch_id;    // 0: trunk
};

// Feed the tags of a segment in order, then finish. A sink takes
//   unit(LayoutUnit, end): the unit's tokens are [begin, end), which may be empty; units come in order and cover the
//   segment, join(first, join): the tokens [first, join) are those of a block's branches, hidden from none after
//   `join`.
class UnitWalker {
 public:
  NPR_HOST_DEVICE explicit UnitWalker(const Segment& segment)
      : segment_(segment), unit_{segment.begin, segment.first_position, segment.first_predecessor, 0} {}

  // False at a violation: from token t on everything is trunk, no more tags are wanted.
  template <typename Sink>
  NPR_HOST_DEVICE bool feed(Tag tag, int32_t t, const Sink& sink) {
    const bool was_in_branch = machine_.in_branch();
    const int32_t branch_id = machine_.num_steps + 1;
    const Violation violation = machine_.feed(tag);
    if (violation != kOk) {
      verdict_ = {violation, t};
      if (was_in_branch) {  // an early join, sampled right after t - 1
        close_branch(t, branch_id, sink);
        join_at(t, t - 1, sink);
      }
      machine_ = Machine{};
      return false;
    }
    if (tag == Tag::kGuidelineEnd) {
      fork_ = t;
      fork_position_ = unit_.position + (t - unit_.begin);
      longest_branch_ = 0;
      close_unit(t + 1, 0, sink);
      open_unit(fork_position_ + 1, fork_);
    } else if (tag == Tag::kStepEnd) {
      close_branch(t + 1, branch_id, sink);
      if (machine_.state == State::kBeforeTakeaway) join_at(t + 1, -1, sink);
    }
    return true;
  }

  template <typename Sink>
  NPR_HOST_DEVICE Verdict finish(bool branching, const Sink& sink) {
    const int32_t end = segment_.end;
    if (machine_.in_branch()) {  // cut: the open branch ends with the sequence
      close_branch(end, machine_.num_steps + 1, sink);
      join_at(end, -1, sink);
    } else {
      close_unit(end, 0, sink);
    }
    if (verdict_.violation == kOk && branching && machine_.finish() != kOk) verdict_ = {machine_.finish(), end};
    if (segment_.status != kOk) verdict_ = {segment_.status, segment_.begin};
    return verdict_;
  }

 private:
  // All branches of a block start at one position, after one token.
  NPR_HOST_DEVICE void open_unit(int32_t position, int32_t predecessor) {
    unit_.position = position;
    unit_.predecessor = predecessor;
  }
  template <typename Sink>
  NPR_HOST_DEVICE void close_unit(int32_t end, int32_t branch_id, const Sink& sink) {
    unit_.branch_id = branch_id;
    sink.unit(unit_, end);
    unit_.begin = end;
  }
  template <typename Sink>
  NPR_HOST_DEVICE void close_branch(int32_t end, int32_t branch_id, const Sink& sink) {
    if (longest_branch_ < end - unit_.begin) longest_branch_ = end - unit_.begin;
    close_unit(end, branch_id, sink);
  }
  template <typename Sink>
  NPR_HOST_DEVICE void join_at(int32_t join, int32_t predecessor, const Sink& sink) {
    sink.join(fork_ + 1, join);
    open_unit(fork_position_ + longest_branch_ + 1, predecessor);
  }

  Segment segment_;
  Machine machine_;
  Verdict verdict_{kOk, -1};
  LayoutUnit unit_;
  int32_t fork_ = -1;           // index of `</guideline>` while its branches are open
  int32_t fork_position_ = 0;   // its position
  int32_t longest_branch_ = 0;  // tokens of the longest branch closed so far
};

}  // namespace npr
