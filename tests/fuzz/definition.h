// The layout of one segment by its definition (cuda_ext/README.md, "Who sees whom"), by descent over the list of
// its tags and pair by pair: shares no code with npr/layout/layout_rules.h and npr/layout/layout_units.h, which it is
// compared with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "npr/layout/layout_units.h"

namespace npr::definition {

// Tags as they stand in the fuzzer's tokens.
enum : int32_t { kGuideline = 1, kGuidelineEnd, kPlan, kPlanEnd, kStep, kStepEnd, kTakeaway, kTakeawayEnd };

struct Place {
  int32_t block = 0;  // of whose branches this token is one; 0: trunk
  int32_t branch = 0;
  int32_t position = 0;
  int32_t predecessor = -1;
};

class Places {
 public:
  Places(const int32_t* tokens, const Segment& segment, bool branching)
      : begin_(segment.begin), end_(segment.end), places_(segment.end - segment.begin) {
    for (int32_t t = begin_; t < end_; ++t) {
      const bool first = t == begin_;
      at(t).position = first ? segment.first_position : at(t - 1).position + 1;
      at(t).predecessor = first ? segment.first_predecessor : t - 1;
    }
    if (!branching) return;
    for (int32_t t = segment.prompt_end; t < end_; ++t) {
      if (tokens[t] >= kGuideline && tokens[t] <= kTakeawayEnd) tags_.emplace_back(tokens[t], t);
    }
    int32_t block = 1;
    while (read_block(block)) ++block;
  }

  const Place& operator[](int32_t t) const { return places_[t - begin_]; }

  // README.md: every earlier token of its sequence except those of sibling branches of the same block.
  bool may_attend(int32_t q, int32_t k) const {
    const Place& query = (*this)[q];
    const Place& key = (*this)[k];
    const bool siblings = query.block > 0 && query.block == key.block && query.branch != key.branch;
    return k <= q && !siblings;
  }

 private:
  Place& at(int32_t t) { return places_[t - begin_]; }
  bool is(int32_t tag, std::size_t ahead = 0) const {
    return next_ + ahead < tags_.size() && tags_[next_ + ahead].first == tag;
  }
  bool accept(int32_t tag) { return is(tag) && ++next_ > 0; }

  // False where the text ends or breaks the language: the rest is trunk already.
  bool read_block(int32_t block) {
    int32_t plans = 0;
    if (!accept(kGuideline)) return false;
    for (; is(kPlan) && is(kPlanEnd, 1); next_ += 2) ++plans;
    if (plans == 0 || !accept(kGuidelineEnd)) return false;
    const int32_t fork = tags_[next_ - 1].second;
    int32_t begin = fork + 1;
    int32_t longest = 0;
    for (int32_t branch = 1; branch <= plans; ++branch) {
      const bool whole = is(kStep) && is(kStepEnd, 1);
      if (whole) next_ += 2;
      const std::size_t wrong = next_ + (is(kStep) ? 1 : 0);  // the tag that breaks the branch, if there is one
      const int32_t end = whole ? tags_[next_ - 1].second + 1 : wrong < tags_.size() ? tags_[wrong].second : end_;
      for (int32_t t = begin; t < end; ++t) {
        at(t) = {block, branch, at(fork).position + 1 + (t - begin), t == begin ? fork : t - 1};
      }
      longest = std::max(longest, end - begin);
      begin = end;
      if (!whole) {  // an early join, which continues the branch that broke
        continue_trunk(begin, at(fork).position + longest + 1, begin - 1);
        return false;
      }
    }
    continue_trunk(begin, at(fork).position + longest + 1, -1);
    return accept(kTakeaway) && accept(kTakeawayEnd);
  }

  void continue_trunk(int32_t join, int32_t position, int32_t predecessor) {
    for (int32_t t = join; t < end_; ++t) at(t) = {0, 0, position + (t - join), t == join ? predecessor : t - 1};
  }

  int32_t begin_;
  int32_t end_;
  std::vector<Place> places_;
  std::vector<std::pair<int32_t, int32_t>> tags_;  // tag, token
  std::size_t next_ = 0;
};

}  // namespace npr::definition
