// Matrix products with packed panels, and what is done to their results.
#pragma once

#include "cpu/math_kernel.h"
#include "cpu/multiply_tile.h"

namespace frspec::cpu::FRSPEC_ISA {

// Bytes of a panel that several row tiles pass over before the next bytes: they stay in the L2
// cache meanwhile, and so does the block that is being fetched.
constexpr int64_t kBlockBytes = 64 << 10;
// Up to this size of x the panels are the outer loop, so that each is read from memory in one go;
// beyond it the blocks of k are, so that x is read from the L2 cache for all panels of the task.
constexpr int64_t kResidentBytes = 192 << 10;
// A single tile asks for its weights this far ahead, once it has enough rows that arithmetic takes
// about as long as memory: the hardware's prefetchers alone leave the two taking turns. With fewer
// rows they are best left alone (docs/cpu.md has the measurement).
constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kPrefetchRows = 3;  // times kGroup

template <typename Weights, int M>
void multiply_rows(const char* weights, int64_t panel_bytes, const float* x, int64_t x_stride,
                   int64_t groups, float* out, bool accumulate, TilePrefetch prefetch) {
  multiply_tile<Weights, M, 1>(weights, panel_bytes, x, x_stride, groups, out, 0, accumulate,
                               prefetch);
}

template <typename Weights>
using MultiplyRows = void (*)(const char*, int64_t, const float*, int64_t, int64_t, float*, bool,
                              TilePrefetch);

template <typename Weights, int N, int M>
FRSPEC_INLINE void multiply_few(const MultiplyTask& task, int64_t groups) {
  constexpr int64_t kOutputs = 2 * Simd::kLanes;
  const char* weights = static_cast<const char*>(task.weights);
  const float* x = static_cast<const float*>(task.x);
  int64_t p = 0;
  for (; p + N <= task.panels; p += N) {
    multiply_tile<Weights, M, N>(weights + p * task.panel_bytes, task.panel_bytes, x, task.x_stride,
                                 groups, task.accumulators + p * M * kOutputs, M * kOutputs, false,
                                 {});
  }
  for (; p < task.panels; ++p) {
    multiply_tile<Weights, M, 1>(weights + p * task.panel_bytes, task.panel_bytes, x, task.x_stride,
                                 groups, task.accumulators + p * M * kOutputs, 0, false, {});
  }
}

template <typename Weights>
void multiply(const MultiplyTask& task) {
  constexpr int64_t kOutputs = 2 * Simd::kLanes;
  static_assert(Simd::kTileRows == 4 || Simd::kTileRows == 6 || Simd::kTileRows == 12);
  const int64_t all_groups = (task.depth + Weights::kGroup - 1) / Weights::kGroup;
  if (task.rows == 1) return multiply_few<Weights, Simd::kTilePanels, 1>(task, all_groups);
  if (task.rows == 2) return multiply_few<Weights, Simd::kTilePanels / 2, 2>(task, all_groups);

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
  const int64_t block_groups = tiles == 1 ? all_groups : kBlockBytes / Weights::kGroupBytes;
  const int64_t blocks = (all_groups + block_groups - 1) / block_groups;
  const bool panels_outer = task.rows * all_groups * 4 <= kResidentBytes || blocks == 1;
  // A single tile runs ahead in its own stream; of several, each brings its share of the next
  // block.
  constexpr int64_t kLines = (kUnroll * Weights::kGroupBytes + 63) / 64;
  const bool prefetches = task.rows >= kPrefetchRows * Weights::kGroup;
  const int64_t prefetch_bytes = prefetches ? (kLines + tiles - 1) / tiles * 64 : 0;

  const char* weights = static_cast<const char*>(task.weights);
  const float* x = static_cast<const float*>(task.x);
  for (int64_t i = 0; i < task.panels * blocks; ++i) {
    const int64_t p = panels_outer ? i / blocks : i % task.panels;
    const int64_t first = (panels_outer ? i % blocks : i / task.panels) * block_groups;
    const int64_t left = all_groups - first;
    const int64_t groups = left < block_groups ? left : block_groups;
    const char* block = weights + p * task.panel_bytes + first * Weights::kGroupBytes;
    const char* next = tiles == 1 ? block + kPrefetchBytes
                       : panels_outer || p + 1 == task.panels
                           ? block + groups * Weights::kGroupBytes
                           : block + task.panel_bytes;
    int64_t row = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = small + (t < large_tiles ? 1 : 0);
      const int64_t share = groups / kUnroll * prefetch_bytes;
      kTiles[m](block, task.panel_bytes, x + row * task.x_stride + first, task.x_stride, groups,
                task.accumulators + (p * task.rows + row) * kOutputs, first > 0,
                {next + t * share, prefetch_bytes});
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
