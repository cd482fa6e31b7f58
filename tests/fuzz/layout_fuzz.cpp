// Any bytes become a packed row; laying it out must neither read nor write out of bounds, and must give what
// definition.h says, token by token and pair by pair.
//
// `make fuzz` builds this with the address and undefined-behaviour sanitizers and feeds it seeded random inputs; with
// clang, -fsanitize=fuzzer and -DNPR_LIBFUZZER the same function is libFuzzer's.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "definition.h"
#include "npr/layout/layout.h"
#include "npr/layout/visibility.h"

namespace {

using namespace npr;

// Reads numbers from the bytes; zeros when they are used up.
class Bytes {
 public:
  Bytes(const uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  uint8_t next() { return place_ < size_ ? data_[place_++] : 0; }

 private:
  const uint8_t* data_;
  std::size_t size_;
  std::size_t place_ = 0;
};

// Mostly plausible values, sometimes any 64 bits.
int64_t integer(Bytes& bytes, int64_t plausible) {
  const uint8_t kind = bytes.next();
  if (kind < 200) return plausible;
  if (kind < 240) return plausible + static_cast<int8_t>(bytes.next());
  int64_t value = 0;
  for (int i = 0; i < 8; ++i) value = static_cast<int64_t>(static_cast<uint64_t>(value) << 8 | bytes.next());
  return value;
}

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "layout_fuzz: violated: %s\n", what);
  std::abort();
}

// Every token and every pair of the row against the definition.
void require_definition(const int32_t* tokens, const std::vector<Segment>& segments, bool branching,
                        const LayoutArrays& out) {
  for (const Segment& segment : segments) {
    const definition::Places places(tokens, segment, branching);
    for (int32_t t = segment.begin; t < segment.end; ++t) {
      require(out.branch_ids[t] == places[t].branch, "branches are those of the definition");
      require(out.position_ids[t] == places[t].position, "positions are those of the definition");
      require(out.predecessor[t] == places[t].predecessor, "predecessors are those of the definition");
      require(out.sequence_end[t] == segment.visible_end, "a key is seen by its sequence or its group");
      for (int32_t q = segment.begin; q < segment.visible_end; ++q) {
        const bool hidden = out.hidden_from[t] <= q && q < out.hidden_until[t];
        const bool expected = q >= segment.end || places.may_attend(q, t);
        require((t <= q && !hidden) == expected, "who sees whom is the definition's");
      }
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  const int64_t num_segments = bytes.next() % 6;
  const bool branching = bytes.next() % 8 != 0;
  const bool has_parents = bytes.next() % 2 == 0;
  const int64_t num_tokens = bytes.next() % 97;
  std::vector<int64_t> bounds;
  std::vector<int64_t> prompts;
  std::vector<int64_t> parents;
  for (int64_t i = 0; i <= num_segments; ++i) {
    const int64_t even = num_segments == 0 ? 0 : num_tokens * i / num_segments;
    bounds.push_back(integer(bytes, even));
    if (i == num_segments) break;
    prompts.push_back(integer(bytes, bytes.next() % 4));
    parents.push_back(integer(bytes, static_cast<int64_t>(bytes.next() % 3) - 1));
  }
  // On the heap and exactly as long as they are: a sanitizer sees the first byte beyond.
  const auto tokens = std::make_unique<int32_t[]>(num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) tokens[t] = bytes.next() % 10;  // 1 to 8 are the tags
  const int64_t ids[kNumTags] = {1, 2, 3, 4, 5, 6, 7, 8};
  const TagTable tags = TagTable::make(ids);

  std::unique_ptr<int32_t[]> storage[6];
  for (auto& array : storage) array = std::make_unique<int32_t[]>(num_tokens);
  const LayoutArrays out{storage[0].get(), storage[1].get(), storage[2].get(),
                         storage[3].get(), storage[4].get(), storage[5].get()};
  std::vector<Segment> segments(num_segments);
  make_segments(bounds.data(), prompts.data(), has_parents ? parents.data() : nullptr, num_segments, num_tokens,
                segments.data());
  int32_t covered = 0;
  for (const Segment& segment : segments) {
    require(covered <= segment.begin && segment.begin <= segment.prompt_end && segment.prompt_end <= segment.end &&
                segment.end <= num_tokens,
            "segments are disjoint and inside the row");
    covered = segment.end;
  }
  write_uncovered(out, segments.data(), num_segments, num_tokens);
  for (const Segment& segment : segments) {
    const Verdict verdict = layout_segment(tokens.get(), segment, tags, branching, out);
    require(verdict.violation == kOk || (verdict.token_index >= segment.begin && verdict.token_index <= segment.end),
            "a verdict points into its segment");
  }

  require_definition(tokens.get(), segments, branching, out);

  std::vector<KeyRun> runs;
  require(make_key_runs(out.hidden_from, out.hidden_until, out.sequence_end, static_cast<int32_t>(num_tokens), runs),
          "every key sees itself and is hidden inside its sequence only");
  for (int64_t t = 0; t < num_tokens; ++t) {
    require(out.position_ids[t] >= 0 && out.position_ids[t] < num_tokens, "positions are inside the row");
    require(out.predecessor[t] >= -1 && out.predecessor[t] < t, "a predecessor comes before");
    require(out.branch_ids[t] >= 0, "branches are numbered from 0");
    const int32_t by = out.predecessor[t];
    if (by < 0) continue;
    const bool hidden = out.hidden_from[by] <= t && t < out.hidden_until[by];
    require(t < out.sequence_end[by] && !hidden, "a token sees the one that predicts it");
  }
  const AttentionPlan plan = make_attention_plan(runs, num_tokens);
  int64_t planned = 0;
  for (std::size_t i = 0; i < plan.units.size(); ++i) planned += plan.units[i].end - plan.units[i].begin;
  require(planned == num_tokens, "the plan covers every query once");
  if (num_tokens > 0) count_visible_pairs(runs, static_cast<int32_t>(num_tokens), 1 + bytes.next() % 40);
  return 0;
}

#ifndef NPR_LIBFUZZER
// layout_fuzz COUNT SEED: half of the inputs are noise, half follow the language with a few bytes changed.
int main(int argc, char** argv) {
  const int64_t count = argc > 1 ? std::atoll(argv[1]) : 1'000'000;
  std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  const uint8_t block[] = {1, 3, 4, 3, 4, 2, 5, 9, 6, 5, 0, 0, 6, 7, 0, 8};
  std::vector<uint8_t> input;
  for (int64_t i = 0; i < count; ++i) {
    input.assign(8 + random() % 120, 0);
    for (auto& byte : input) byte = static_cast<uint8_t>(random());
    if (i % 2 == 0) {
      for (std::size_t place = 16; place < input.size(); ++place) input[place] = block[(place - 16) % sizeof(block)];
      for (int change = static_cast<int>(random() % 4); change > 0; --change) {
        input[random() % input.size()] = static_cast<uint8_t>(random());
      }
    }
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("layout_fuzz: %lld inputs, no violation\n", static_cast<long long>(count));
  return 0;
}
#endif
