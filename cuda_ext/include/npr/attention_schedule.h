// The tiles of an attention plan and how they are split into tasks: by the layout and the heads, never by threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "npr/layout/visibility.h"
#include "npr/sizes.h"

namespace npr {

// Queries [begin, end) of unit `unit`: never across a boundary of packed blocks.
struct QueryTile {
  int32_t begin;
  int32_t end;
  int32_t unit;
};

// Consecutive tiles. In backward: the keys that they touch, and where their gradients go (0: the result itself).
struct TileRange {
  int32_t first_tile;
  int32_t end_tile;
  int32_t first_token;
  int32_t end_token;
  int64_t scratch_token;  // first row in the scratch for partial gradients, -1: into the result
};

struct Schedule {
  std::vector<QueryTile> tiles;
  std::vector<TileRange> forward;
  std::vector<TileRange> backward;
  int64_t scratch_tokens = 0;
};

constexpr int64_t kTileOverhead = 2048;  // a tile's fixed cost in pairs
constexpr int kForwardTasks = 24;        // tasks that a key head's work is split into
constexpr int kBackwardTasks = 24;
constexpr int kMaxSlices = 4;               // of one component in backward: each but the last costs scratch
constexpr int64_t kWorthSlicing = 1 << 18;  // pairs

inline Schedule make_schedule(const AttentionPlan& plan, int group) {
  Schedule schedule;
  const int tokens_per_tile = std::max(1, kTileRows / group);
  std::vector<int64_t> cost_until{0};  // by tile
  std::vector<int32_t> first_tile_of_component;
  std::size_t component = 0;
  for (std::size_t u = 0; u < plan.units.size(); ++u) {
    if (component < plan.components.size() && plan.components[component] == static_cast<int32_t>(u)) {
      first_tile_of_component.push_back(static_cast<int32_t>(schedule.tiles.size()));
      ++component;
    }
    const Unit& unit = plan.units[u];
    const std::size_t end = u + 1 < plan.units.size() ? plan.units[u + 1].first_interval : plan.intervals.size();
    int64_t keys = 0;
    for (std::size_t i = unit.first_interval; i < end; ++i) keys += plan.intervals[i].end - plan.intervals[i].begin;
    for (int32_t begin = unit.begin; begin < unit.end;) {
      const int32_t block_end = (begin / kTileKeys + 1) * kTileKeys;
      const int32_t tile_end = std::min({unit.end, begin + tokens_per_tile, block_end});
      schedule.tiles.push_back({begin, tile_end, static_cast<int32_t>(u)});
      cost_until.push_back(cost_until.back() + kTileOverhead +
                           (tile_end - begin) * (keys + begin - unit.begin + (tile_end - begin + 1) / 2));
      begin = tile_end;
    }
  }
  const auto num_tiles = static_cast<int32_t>(schedule.tiles.size());
  first_tile_of_component.push_back(num_tiles);
  const int64_t total = cost_until.back();
  // The keys before the first query belong to the first component.
  const auto first_token = [&](int32_t tile) { return tile == 0 ? 0 : schedule.tiles[tile].begin; };
  const auto end_token = [&](int32_t tile) { return schedule.tiles[tile - 1].end; };
  const auto tile_at_cost = [&](int64_t cost, int32_t low, int32_t high) {
    return static_cast<int32_t>(std::lower_bound(cost_until.begin() + low, cost_until.begin() + high, cost) -
                                cost_until.begin());
  };

  for (int32_t begin = 0; begin < num_tiles;) {
    const int32_t end = std::max(begin + 1, tile_at_cost(cost_until[begin] + total / kForwardTasks, begin, num_tiles));
    schedule.forward.push_back({begin, end, first_token(begin), end_token(end), -1});
    begin = end;
  }

  for (std::size_t c = 0; c + 1 < first_tile_of_component.size();) {
    const int32_t begin = first_tile_of_component[c];
    std::size_t next = c + 1;
    while (next + 1 < first_tile_of_component.size() &&
           cost_until[first_tile_of_component[next + 1]] - cost_until[begin] <= total / kBackwardTasks) {
      ++next;
    }
    const int32_t end = first_tile_of_component[next];
    const int64_t cost = cost_until[end] - cost_until[begin];
    int64_t slices = 1;
    if (next == c + 1 && cost > kWorthSlicing) {
      slices = std::clamp<int64_t>(kMaxSlices * cost / total, 1, kMaxSlices);
    }
    int32_t slice_begin = begin;
    for (int64_t slice = 1; slice <= slices && slice_begin < end; ++slice) {
      const int64_t cost_wanted = cost_until[begin] + cost * slice / slices;
      const int32_t slice_end =
          slice == slices ? end : std::max(slice_begin + 1, tile_at_cost(cost_wanted, begin, end));
      TileRange range{slice_begin, slice_end, first_token(begin), end_token(slice_end), -1};
      if (slice_end != end) {
        range.scratch_token = schedule.scratch_tokens;
        schedule.scratch_tokens += range.end_token - range.first_token;
      }
      schedule.backward.push_back(range);
      slice_begin = slice_end;
    }
    c = next;
  }
  return schedule;
}

}  // namespace npr
