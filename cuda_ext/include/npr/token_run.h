// Neighbouring tokens that paged attention computes together.
#pragma once

#include <cstdint>

namespace npr {

struct TokenRun {
  int64_t first;
  int32_t count;
  int32_t table_row;  // of the first token
  int32_t together;   // keys at the front that are read for all tokens; a token beyond its length sees none of them
  bool one_row;       // all tokens share a block table: every key is read together
};

}  // namespace npr
