// x W^T for a few rows of x, as in a decode step: every row of W is read once, from where it lies, and used for all of x.
//
// A library's GEMM packs W first, which for 2 to 31 rows costs more than the product. Here a register tile of
// kTileX x kTileW dot products runs along the shared dimension C; since the tile has as many sums as a vector has
// lanes, one transposing reduction leaves all of them in one vector.
#pragma once

#include <algorithm>

#include "npr/simd.h"

namespace npr {

template <typename Stored>
class FewRowsLinear {
  using T = ComputeOf<Stored>;
  static constexpr int kTileX = kLanes<T> >= 8 ? 4 : (kLanes<T> >= 4 ? 2 : 1);
  static constexpr int kTileW = kLanes<T> / kTileX;
  static constexpr int kPrefetchBytes = 2048;

 public:
  FewRowsLinear(const Stored* x, const Stored* weight, const Stored* bias, Stored* output, int64_t num_rows,
                int64_t in_features, int64_t out_features)
      : x_(x),
        weight_(weight),
        bias_(bias),
        output_(output),
        num_rows_(num_rows),
        in_features_(in_features),
        out_features_(out_features) {}

  // Writes outputs [begin, end) of every row; ranges may run at the same time.
  void run(int64_t begin, int64_t end) const {
    for (int64_t d = begin; d < end; d += kTileW) {
      for (int64_t t = 0; t < num_rows_; t += kTileX) {
        tile(t, static_cast<int>(std::min<int64_t>(kTileX, num_rows_ - t)), d,
             static_cast<int>(std::min<int64_t>(kTileW, end - d)), t == 0);
      }
    }
  }

 private:
  // A tile at the edge computes its last row several times rather than branch in the inner loop.
  void tile(int64_t t, int num_x, int64_t d, int num_w, bool prefetch) const {
    const Stored* x[kTileX];
    const Stored* w[kTileW];
    for (int i = 0; i < kTileX; ++i) x[i] = x_ + (t + std::min(i, num_x - 1)) * in_features_;
    for (int j = 0; j < kTileW; ++j) w[j] = weight_ + (d + std::min(j, num_w - 1)) * in_features_;
    Vec<T> sums[kTileX * kTileW] = {};
    int64_t c = 0;
    for (; c + kLanes<T> <= in_features_; c += kLanes<T>) {
      Vec<T> xs[kTileX];
#pragma GCC unroll 8
      for (int i = 0; i < kTileX; ++i) xs[i] = load(x[i] + c);
#pragma GCC unroll 8
      for (int j = 0; j < kTileW; ++j) {
        const Vec<T> ws = load(w[j] + c);
        if (prefetch) __builtin_prefetch(reinterpret_cast<const char*>(w[j] + c) + kPrefetchBytes);
#pragma GCC unroll 8
        for (int i = 0; i < kTileX; ++i) sums[i * kTileW + j] += xs[i] * ws;
      }
    }
    Vec<T> total = reduce_rows<T>(sums, Add{});
    for (; c < in_features_; ++c) {
      for (int i = 0; i < kTileX; ++i) {
        for (int j = 0; j < kTileW; ++j) total[i * kTileW + j] += widen(x[i][c]) * widen(w[j][c]);
      }
    }
    for (int i = 0; i < num_x; ++i) {
      for (int j = 0; j < num_w; ++j) {
        const T bias = bias_ == nullptr ? T{} : widen(bias_[d + j]);
        output_[(t + i) * out_features_ + d + j] = narrow<Stored>(total[i * kTileW + j] + bias);
      }
    }
  }

  const Stored* x_;
  const Stored* weight_;
  const Stored* bias_;
  Stored* output_;
  int64_t num_rows_;
  int64_t in_features_;
  int64_t out_features_;
};

}  // namespace npr
