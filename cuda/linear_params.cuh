// Sizes and arguments of the skinny product (linear.cu).
#pragma once

#include <cuda.h>

#include "device.cuh"
#include "linear_parts.cuh"

namespace frspec::cuda {
namespace {

constexpr int kRowWarps = 4;
constexpr int kWarpgroup = 4 * kWarp;      // threads that multiply together on Hopper
constexpr int kTileRows = kRowWarps * 32;  // rows of weights of a block
constexpr int kDepth = 64;                 // k of a stage
constexpr int kPieces = kDepth / 8;        // 16-byte pieces of a row of a stage
constexpr int kTokenGroup = 64;            // tokens of a block
constexpr int kOutPitch = kTileRows + 4;   // floats between tokens of the finished tile

// How a block for 8 * kTokenTiles tokens is cut among warps. One warp for each 32 rows leaves the
// tensor cores waiting for ldmatrix where there are many tokens, so there two share the rows.
template <int kTokenTiles>
struct Tiling {
  static constexpr int kTokens = kTokenTiles * 8;
  static constexpr int kTokenWarps = kTokenTiles >= 4 ? 2 : 1;
  static constexpr int kWarpTiles = kTokenTiles / kTokenWarps;  // token tiles of a warp
  static constexpr int kThreads = kRowWarps * kTokenWarps * kWarp;
  // On a multiprocessor, that registers have to leave room for.
  static constexpr int kBlocks = kTokenWarps == 1 ? 3 : 2;
};

// Stages of the pipeline. A grid of at most one block for each multiprocessor has the deep one
// where there is room: more of the memory's time is under way, and one block alone fits a
// multiprocessor, so that none has two while another has none.
constexpr int kStages = 4;
template <int kTokenTiles>
constexpr int kDeepStages = kTokenTiles <= 2 ? 7 : 8;
constexpr int kLeastDeepBytes = 200 << 10;  // shared memory of a multiprocessor
// What a block may have on every device that there are kernels for, less what kernels declare.
constexpr size_t kSharedEverywhere = 98 << 10;

constexpr int kLeastPartDepth = 256;

// Outputs of a tile: gate and up rows share it.
template <bool kSwiglu>
constexpr int kTileOutputs = kSwiglu ? kTileRows / 2 : kTileRows;

struct LinearParams {
  const void* w;
  const void* up;  // swiglu
  const float* bias;
  const float* up_bias;
  const void* x;
  int64_t x_stride;
  const void* residual;
  int64_t residual_stride;
  void* out;
  int64_t out_stride;
  float* sums;    // several parts: [parts, n, width]
  int64_t width;  // outputs in whole tiles, gate and up rows of swiglu
  int n;          // tokens
  int out_features;
  int in_features;
  int parts;
  int part_depth;
  int groups;  // of kTokenGroup tokens
  bool quads;  // four outputs are always there, and aligned
};

// Where Hopper's copies find weights and tokens.
struct LinearMaps {
  CUtensorMap w;
  CUtensorMap up;  // swiglu
  CUtensorMap x;
};

}  // namespace
}  // namespace frspec::cuda
