// Sizes and arguments of the skinny product (linear.cu).
#pragma once

#include "device.cuh"

namespace frspec::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTileRows = kWarps * 32;         // rows of weights of a block
constexpr int kDepth = 64;                     // k of a stage
constexpr int kPieces = kDepth / 8;            // 16-byte pieces of a row of a stage
constexpr int kPassRows = kThreads / kPieces;  // rows of a stage that all threads copy at once
constexpr int kTokenGroup = 64;                // tokens of a block
constexpr int kStages = 4;
constexpr int kBlocks = 3;          // on a multiprocessor, that registers have to leave room for
constexpr int kPrefetchStages = 4;  // that are asked for, into L2, while the kernel waits
constexpr int kOutPitch = kTileRows + 4;  // floats between tokens of the finished tile

constexpr int kMaxParts = 8;
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
  float* partial;     // [tiles, groups, parts, tokens, kTileRows]
  unsigned* tickets;  // [tiles, groups]
  int n;              // tokens
  int out_features;
  int in_features;
  int parts;
  int part_depth;
  int groups;  // of kTokenGroup tokens
  bool quads;  // four outputs are always there, and aligned
};

}  // namespace
}  // namespace frspec::cuda
