// Matrix products with packed panels, and what is done to their results.
#pragma once

#include "cpu/math_kernel.h"
#include "cpu/multiply_tile.h"

namespace frspec::cpu::FRSPEC_ISA {

// k per block when several row tiles pass over a panel: the panel's block (16 KB at most) and a
// tile's x stay in the L1 cache meanwhile.
constexpr int64_t kDepthBlock = 256;
// Up to this size of x the panels are the outer loop, so that each is read from memory in one go;
// beyond it the blocks of k are, so that x is read from the L2 cache for all panels of the task.
constexpr int64_t kResidentBytes = 192 << 10;
// How far ahead of itself a single tile asks for its weights: the hardware's prefetchers alone
// leave arithmetic and memory taking turns (4 rows then cost 1.45x one row, with it 1.05x).
constexpr int64_t kPrefetchBytes = 4096;

template <typename Weights, int M>
void multiply_rows(const char* weights, int64_t panel_bytes, const float* x, int64_t x_stride,
                   int64_t depth, float* out, bool accumulate, TilePrefetch prefetch) {
  multiply_tile<Weights, M, 1>(weights, panel_bytes, x, x_stride, depth, out, 0, accumulate,
                               prefetch);
}

template <typename Weights>
using MultiplyRows = void (*)(const char*, int64_t, const float*, int64_t, int64_t, float*, bool,
                              TilePrefetch);

template <typename Weights, int N, int M>
FRSPEC_INLINE void multiply_few(const MultiplyTask& task) {
  constexpr int64_t kOutputs = 2 * Simd::kLanes;
  const char* weights = static_cast<const char*>(task.weights);
  const float* x = static_cast<const float*>(task.x);
  int64_t p = 0;
  for (; p + N <= task.panels; p += N) {
    multiply_tile<Weights, M, N>(weights + p * task.panel_bytes, task.panel_bytes, x, task.x_stride,
                                 task.depth, task.accumulators + p * M * kOutputs, M * kOutputs,
                                 false, {weights, 0});
  }
  for (; p < task.panels; ++p) {
    multiply_tile<Weights, M, 1>(weights + p * task.panel_bytes, task.panel_bytes, x, task.x_stride,
                                 task.depth, task.accumulators + p * M * kOutputs, 0, false,
                                 {weights, 0});
  }
}

template <typename Weights>
void multiply(const MultiplyTask& task) {
  constexpr int64_t kOutputs = 2 * Simd::kLanes;
  static_assert(Simd::kTileRows == 4 || Simd::kTileRows == 6 || Simd::kTileRows == 12);
  if (task.rows == 1) return multiply_few<Weights, Simd::kTilePanels, 1>(task);
  if (task.rows == 2) return multiply_few<Weights, Simd::kTilePanels / 2, 2>(task);

  static constexpr MultiplyRows<Weights> kTiles[] = {
      nullptr,
      multiply_rows<Weights, 1>,
      multiply_rows<Weights, 2>,
      multiply_rows<Weights, 3>,
      multiply_rows<Weights, 4>,
#define FRSPEC_TILE(m) \
  Simd::kTileRows >= m ? multiply_rows<Weights, m <= Simd::kTileRows ? m : 1> : nullptr
      FRSPEC_TILE(5),
      FRSPEC_TILE(6),
      FRSPEC_TILE(7),
      FRSPEC_TILE(8),
      FRSPEC_TILE(9),
      FRSPEC_TILE(10),
      FRSPEC_TILE(11),
      FRSPEC_TILE(12),
#undef FRSPEC_TILE
  };
  const int64_t tiles = tile_count(task.rows);
  const int64_t small = task.rows / tiles;
  const int64_t large_tiles = task.rows % tiles;
  const int64_t depth_block = tiles == 1 ? task.depth : kDepthBlock;
  const int64_t blocks = (task.depth + depth_block - 1) / depth_block;
  const bool panels_outer = task.rows * task.depth * 4 <= kResidentBytes || blocks == 1;
  // A single tile runs ahead in its own stream; of several, each brings its share of the next
  // block.
  const int64_t prefetch_step = (4 * Weights::kRowBytes + tiles - 1) / tiles;

  const char* weights = static_cast<const char*>(task.weights);
  const float* x = static_cast<const float*>(task.x);
  for (int64_t i = 0; i < task.panels * blocks; ++i) {
    const int64_t p = panels_outer ? i / blocks : i % task.panels;
    const int64_t first_k = (panels_outer ? i % blocks : i / task.panels) * depth_block;
    const int64_t left = task.depth - first_k;
    const int64_t depth = left < depth_block ? left : depth_block;
    const char* block = weights + p * task.panel_bytes + first_k * Weights::kRowBytes;
    const char* next = tiles == 1                             ? block + kPrefetchBytes
                       : panels_outer || p + 1 == task.panels ? block + depth * Weights::kRowBytes
                                                              : block + task.panel_bytes;
    int64_t row = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = small + (t < large_tiles ? 1 : 0);
      const int64_t share = depth / 4 * prefetch_step;
      kTiles[m](block, task.panel_bytes, x + row * task.x_stride + first_k, task.x_stride, depth,
                task.accumulators + (p * task.rows + row) * kOutputs, first_k > 0,
                {next + t * share, prefetch_step});
      row += m;
    }
  }
}

inline void finish(const FinishTask& task) {
  using F = Simd::F;
  constexpr int64_t kOutputs = 2 * Simd::kLanes;
  for (int64_t j = 0; j < task.cols; j += Simd::kLanes) {
    const int64_t count = task.cols - j;
    const bool whole = count >= Simd::kLanes;
    F bias = Simd::zero();
    if (task.bias != nullptr) {
      bias = whole ? Simd::load(task.bias + j) : Simd::load_partial(task.bias + j, count);
    }
    for (int64_t r = 0; r < task.rows; ++r) {
      F value = Simd::load(task.accumulators + r * kOutputs + j);
      if (task.bias != nullptr) value = Simd::add(value, bias);
      if (task.residual != nullptr) {
        const float* residual = task.residual + r * task.residual_stride + j;
        value =
            Simd::add(value, whole ? Simd::load(residual) : Simd::load_partial(residual, count));
      }
      float* out = task.out + r * task.out_stride + j;
      if (whole) {
        Simd::store(out, value);
      } else {
        Simd::store_partial(out, value, count);
      }
    }
  }
}

inline void finish_swiglu(const FinishSwigluTask& task) {
  using F = Simd::F;
  constexpr int64_t kOutputs = 2 * Simd::kLanes;
  for (int64_t j = 0; j < task.cols; j += Simd::kLanes) {
    const int64_t count = task.cols - j;
    for (int64_t r = 0; r < task.rows; ++r) {
      F gate = Simd::load(task.gate + r * kOutputs + j);
      F up = Simd::load(task.up + r * kOutputs + j);
      if (task.gate_bias != nullptr) {
        gate = Simd::add(gate, Simd::load_partial(task.gate_bias + j, count));
      }
      if (task.up_bias != nullptr) up = Simd::add(up, Simd::load_partial(task.up_bias + j, count));
      const F value = Simd::mul(silu(gate), up);
      float* out = task.out + r * task.out_stride + j;
      if (count >= Simd::kLanes) {
        Simd::store(out, value);
      } else {
        Simd::store_partial(out, value, count);
      }
    }
  }
}

}  // namespace frspec::cpu::FRSPEC_ISA
