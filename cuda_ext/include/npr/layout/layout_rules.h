// The tag structure of a response as a state machine: the only place in C++ that knows it.
// Torch-free and usable from host and device. Codes mirror npr_ext/layout/violations.py (a test compares them).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NPR_HOST_DEVICE __host__ __device__
#else
#define NPR_HOST_DEVICE
#endif

namespace npr {

enum Violation : int32_t {
  kOk = 0,
  kStrayTag = 1,
  kNestedTag = 2,
  kMismatchedTag = 3,
  kGuidelineWithoutPlan = 4,
  kMissingStep = 5,
  kExtraStep = 6,
  kUnfinishedBlock = 7,
  kMissingTakeaway = 8,
  kUnclosedGuideline = 9,
  kUnclosedPlan = 10,
  kUnclosedStep = 11,
  kUnclosedTakeaway = 12,
  kBadBounds = 90,
  kBadPromptLength = 91,
  kBadParent = 92,
};

// Order of the fields of TagIds (npr_ext/layout/tags.py); closing tags are the odd ones.
enum class Tag : int32_t {
  kNone = -1,
  kGuideline = 0,
  kGuidelineEnd = 1,
  kPlan = 2,
  kPlanEnd = 3,
  kStep = 4,
  kStepEnd = 5,
  kTakeaway = 6,
  kTakeawayEnd = 7,
};
constexpr int kNumTags = 8;

// Where a response stands. Branches consist of kBeforeStep and kStep.
enum class State : int32_t { kTrunk, kGuideline, kPlan, kBeforeStep, kStep, kBeforeTakeaway, kTakeaway };

struct TagTable {
  int64_t ids[kNumTags];
  int64_t lowest;
  uint64_t range;  // highest - lowest: one comparison rejects almost every token

  NPR_HOST_DEVICE static TagTable make(const int64_t* ids) {
    TagTable table{};
    int64_t lowest = ids[0];
    int64_t highest = ids[0];
    for (int i = 0; i < kNumTags; ++i) {
      table.ids[i] = ids[i];
      lowest = ids[i] < lowest ? ids[i] : lowest;
      highest = ids[i] > highest ? ids[i] : highest;
    }
    table.lowest = lowest;
    table.range = static_cast<uint64_t>(highest) - static_cast<uint64_t>(lowest);
    return table;
  }

  NPR_HOST_DEVICE Tag of(int64_t token) const {
    if (static_cast<uint64_t>(token) - static_cast<uint64_t>(lowest) > range) return Tag::kNone;
    for (int i = 0; i < kNumTags; ++i) {
      if (ids[i] == token) return static_cast<Tag>(i);
    }
    return Tag::kNone;
  }
};

struct Machine {
  State state = State::kTrunk;
  int32_t num_plans = 0;  // plans closed in the open block
  int32_t num_steps = 0;  // steps closed in the open block

  NPR_HOST_DEVICE bool in_branch() const { return state == State::kBeforeStep || state == State::kStep; }

  // A tag inside a text that only `closing` may end.
  NPR_HOST_DEVICE static Violation misplaced(Tag tag) {
    return static_cast<int32_t>(tag) % 2 == 0 ? kNestedTag : kMismatchedTag;
  }

  // Feeds one tag; on a violation the machine stays where it is.
  NPR_HOST_DEVICE Violation feed(Tag tag) {
    switch (state) {
      case State::kTrunk:
        if (tag != Tag::kGuideline) return kStrayTag;
        state = State::kGuideline;
        num_plans = num_steps = 0;
        return kOk;
      case State::kGuideline:
        if (tag == Tag::kPlan) {
          state = State::kPlan;
          return kOk;
        }
        if (tag != Tag::kGuidelineEnd) return misplaced(tag);
        if (num_plans == 0) return kGuidelineWithoutPlan;
        state = State::kBeforeStep;
        return kOk;
      case State::kPlan:
        if (tag != Tag::kPlanEnd) return misplaced(tag);
        ++num_plans;
        state = State::kGuideline;
        return kOk;
      case State::kBeforeStep:
        if (tag == Tag::kTakeaway) return kMissingStep;
        if (tag == Tag::kGuideline) return kUnfinishedBlock;
        if (tag != Tag::kStep) return kStrayTag;
        state = State::kStep;
        return kOk;
      case State::kStep:
        if (tag != Tag::kStepEnd) return misplaced(tag);
        ++num_steps;
        state = num_steps < num_plans ? State::kBeforeStep : State::kBeforeTakeaway;
        return kOk;
      case State::kBeforeTakeaway:
        if (tag == Tag::kStep) return kExtraStep;
        if (tag == Tag::kGuideline) return kMissingTakeaway;
        if (tag != Tag::kTakeaway) return kStrayTag;
        state = State::kTakeaway;
        return kOk;
      case State::kTakeaway:
        if (tag != Tag::kTakeawayEnd) return misplaced(tag);
        state = State::kTrunk;
        return kOk;
    }
    return kOk;
  }

  // The violation of a text that ends here.
  NPR_HOST_DEVICE Violation finish() const {
    switch (state) {
      case State::kTrunk:
        return kOk;
      case State::kGuideline:
        return kUnclosedGuideline;
      case State::kPlan:
        return kUnclosedPlan;
      case State::kBeforeStep:
        return kUnfinishedBlock;
      case State::kStep:
        return kUnclosedStep;
      case State::kBeforeTakeaway:
        return kMissingTakeaway;
      case State::kTakeaway:
        return kUnclosedTakeaway;
    }
    return kOk;
  }
};

}  // namespace npr
