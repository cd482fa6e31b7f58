// From the O(T) arrays to what attention computes: few rectangles and triangles, never T x T entries. Torch-free.
//
//   arrays ──► key runs (equal visibility) ──► sweep over the queries ──► units: queries that see the same earlier keys
//                                         └──► block lists: tiles that are full, partial or absent
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace npr {

// Keys [begin, end) that the same queries see: those up to hidden_from and from hidden_until to sequence_end.
struct KeyRun {
  int32_t begin;
  int32_t end;
  int32_t hidden_from;
  int32_t hidden_until;
  int32_t sequence_end;
};

struct Interval {
  int32_t begin;
  int32_t end;
};

// Queries [begin, end) see intervals [first_interval, next unit's first_interval) and each other causally.
struct Unit {
  int32_t begin;
  int32_t end;
  int32_t first_interval;
};

// Of the tokens of a row all are keys; queries are those from `first_query` on (a context-parallel shard of a row
// fetches keys for whose queries others care).
struct AttentionPlan {
  int32_t num_tokens = 0;
  int32_t first_query = 0;
  std::vector<Unit> units;
  std::vector<Interval> intervals;
  std::vector<int32_t> components;  // first unit of each set of queries that shares no key with the others
};

// False if the arrays are no layout: every key must see itself, and its interval must lie inside its sequence.
inline bool make_key_runs(const int32_t* hidden_from, const int32_t* hidden_until, const int32_t* sequence_end,
                          int32_t num_tokens, std::vector<KeyRun>& runs) {
  for (int32_t k = 0; k < num_tokens; ++k) {
    int32_t from = hidden_from[k];
    int32_t until = hidden_until[k];
    const int32_t end = sequence_end[k];
    if (end <= k || end > num_tokens) return false;
    if (from >= until) {
      from = until = end;
    } else if (from <= k || until > end) {
      return false;
    }
    if (!runs.empty() && runs.back().hidden_from == from && runs.back().hidden_until == until &&
        runs.back().sequence_end == end) {
      runs.back().end = k + 1;
    } else {
      runs.push_back({k, k + 1, from, until, end});
    }
  }
  return true;
}

// Sorted, disjoint, merged intervals of keys.
class KeySet {
 public:
  const std::vector<Interval>& intervals() const { return intervals_; }

  void insert(Interval added) {
    auto next = std::lower_bound(intervals_.begin(), intervals_.end(), added.begin,
                                 [](const Interval& each, int32_t key) { return each.end < key; });
    auto last = next;
    while (last != intervals_.end() && last->begin <= added.end) {
      added.begin = std::min(added.begin, last->begin);
      added.end = std::max(added.end, last->end);
      ++last;
    }
    if (next == last) {
      intervals_.insert(next, added);
    } else {
      *next = added;
      intervals_.erase(next + 1, last);
    }
  }

  void remove(Interval removed) {
    auto each = std::lower_bound(intervals_.begin(), intervals_.end(), removed.begin,
                                 [](const Interval& interval, int32_t key) { return interval.end <= key; });
    while (each != intervals_.end() && each->begin < removed.end) {
      const Interval before{each->begin, removed.begin};
      const Interval after{removed.end, each->end};
      if (before.begin < before.end && after.begin < after.end) {
        *each = before;
        intervals_.insert(each + 1, after);
        return;
      }
      if (before.begin < before.end) {
        *each++ = before;
      } else if (after.begin < after.end) {
        *each++ = after;
      } else {
        each = intervals_.erase(each);
      }
    }
  }

 private:
  std::vector<Interval> intervals_;
};

inline AttentionPlan make_attention_plan(const std::vector<KeyRun>& runs, int32_t num_tokens, int32_t first_query = 0) {
  struct Event {
    int32_t at;
    int32_t run;
    bool shows;
  };
  AttentionPlan plan{num_tokens, first_query, {}, {}, {}};
  std::vector<int32_t> cuts{first_query};
  std::vector<Event> events;
  for (int32_t i = 0; i < static_cast<int32_t>(runs.size()); ++i) {
    const KeyRun& run = runs[i];
    cuts.insert(cuts.end(), {run.begin, run.hidden_from, run.hidden_until, run.sequence_end});
    if (run.hidden_from < run.sequence_end) events.push_back({run.hidden_from, i, false});
    if (run.hidden_until < run.sequence_end && run.hidden_from < run.hidden_until) {
      events.push_back({run.hidden_until, i, true});
    }
    if (run.hidden_until < run.sequence_end || run.hidden_from == run.sequence_end) {
      events.push_back({run.sequence_end, i, false});
    }
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::sort(events.begin(), events.end(), [](const Event& a, const Event& b) { return a.at < b.at; });

  KeySet seen;
  int num_hidden = 0;  // runs that some later unit sees again
  auto event = events.begin();
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    const int32_t begin = cuts[i];
    for (; event != events.end() && event->at == begin; ++event) {
      const Interval keys{runs[event->run].begin, runs[event->run].end};
      const bool returns = runs[event->run].hidden_until < runs[event->run].sequence_end;
      if (event->shows) {
        seen.insert(keys);
        --num_hidden;
      } else {
        seen.remove(keys);
        if (returns && event->at < runs[event->run].sequence_end) ++num_hidden;
      }
    }
    if (begin >= first_query) {
      if (plan.units.empty() || (seen.intervals().empty() && num_hidden == 0)) {
        plan.components.push_back(static_cast<int32_t>(plan.units.size()));
      }
      plan.units.push_back({begin, cuts[i + 1], static_cast<int32_t>(plan.intervals.size())});
      plan.intervals.insert(plan.intervals.end(), seen.intervals().begin(), seen.intervals().end());
    }
    seen.insert({begin, cuts[i + 1]});
  }
  return plan;
}

// Visible pairs of every tile of `block` queries from `first_query` on (a multiple of `block`) x `block` keys:
// [query blocks, key blocks], row by row.
inline std::vector<int32_t> count_visible_pairs(const std::vector<KeyRun>& runs, int32_t num_tokens, int32_t block,
                                                int32_t first_query = 0) {
  const int32_t num_blocks = (num_tokens + block - 1) / block;
  const int32_t first_block = first_query / block;
  std::vector<int32_t> pairs(static_cast<std::size_t>(num_blocks - first_block) * num_blocks);
  const auto tile = [&](int32_t q_block, int32_t k_block) -> int32_t& {
    return pairs[static_cast<std::size_t>(q_block - first_block) * num_blocks + k_block];
  };
  const auto add_rectangle = [&](int32_t q_begin, int32_t q_end, int32_t k_block, int32_t keys) {
    for (int32_t q = std::max(q_begin, first_query); q < q_end;) {
      const int32_t q_block = q / block;
      const int32_t next = std::min(q_end, (q_block + 1) * block);
      tile(q_block, k_block) += (next - q) * keys;
      q = next;
    }
  };
  for (const KeyRun& run : runs) {
    for (int32_t begin = run.begin; begin < run.end;) {
      const int32_t k_block = begin / block;
      const int32_t end = std::min(run.end, (k_block + 1) * block);
      const int32_t keys = end - begin;
      if (k_block >= first_block) tile(k_block, k_block) += keys * (keys + 1) / 2;
      add_rectangle(end, run.hidden_from, k_block, keys);
      add_rectangle(run.hidden_until, run.sequence_end, k_block, keys);
      begin = end;
    }
  }
  return pairs;
}

}  // namespace npr
