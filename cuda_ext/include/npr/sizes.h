// Sizes that the operators' checks and their kernels share, the same at every level.
#pragma once

namespace npr {

constexpr int kTileRows = 64;   // query rows (tokens x grouped heads) of a tile
constexpr int kTileKeys = 128;  // keys of a tile
constexpr int kMaxHeadDim = 128;
constexpr int kTileStride = 144;  // elements between rows of a tile in scratch: a constant, for immediate addressing; a
                                  // vector that starts inside the first 128 may run over by less than 16
constexpr int kMaxRotatedDim = 256;  // of a head in split_heads

}  // namespace npr
