// Matrix products with packed panels, and what is done to their results.
#pragma once

#include "cpu/math_kernel.h"
#include "cpu/multiply_tile.h"

namespace frspec::cpu::FRSPEC_ISA {

// Bytes of a panel that several row tiles pass over before the next bytes: they stay in the L2
// cache meanwhile, and so does the block that is being fetched.
constexpr int64_t kBlockBytes = 64 << 10;
// A single tile asks for its weights this far ahead, once it has enough rows that arithmetic takes
// about as long as memory: the hardware's prefetchers alone leave the two taking turns. With fewer
// rows they are best left alone (docs/cpu.md has the measurement).
constexpr int64_t kPrefetchBytes = 6656;
constexpr int64_t kPrefetchRows = 3;  // times kGroup

// A row has two sums for each panel: panels side by side hide the latency of its multiply-adds.
template <typename Weights>
void multiply_row(const MultiplyTask& task, int64_t groups) {
  constexpr int64_t kOutputs = 2 * Simd::kLanes;
  constexpr int kPanels = Simd::kRowPanels;
  const char* weights = static_cast<const char*>(task.weights);
  const float* x = static_cast<const float*>(task.x);
  int64_t p = 0;
  for (; p + kPanels <= task.panels; p += kPanels) {
    multiply_tile<Weights, 1, kPanels>(weights + p * task.panel_bytes, task.panel_bytes, x, 0,
                                       groups, task.accumulators + p * kOutputs, kOutputs,
                                       task.accumulate, nullptr);
  }
  for (; p < task.panels; ++p) {
    multiply_tile<Weights, 1, 1>(weights + p * task.panel_bytes, 0, x, 0, groups,
                                 task.accumulators + p * kOutputs, 0, task.accumulate, nullptr);
  }
}

template <typename Weights, int M, int kLines>
void multiply_rows(const char* weights, const float* x, int64_t x_stride, int64_t groups,
                   float* out, bool accumulate, const char* next) {
  multiply_tile<Weights, M, 1, kLines>(weights, 0, x, x_stride, groups, out, 0, accumulate, next);
}

template <typename Weights, int kLines>
inline constexpr decltype(&multiply_rows<Weights, 1, 0>) kRowTiles[] = {
#define FRSPEC_TILE(m) multiply_rows<Weights, m <= Simd::kTileRows ? m : 1, kLines>
    nullptr,         FRSPEC_TILE(1),  FRSPEC_TILE(2), FRSPEC_TILE(3), FRSPEC_TILE(4),
    FRSPEC_TILE(5),  FRSPEC_TILE(6),  FRSPEC_TILE(7), FRSPEC_TILE(8), FRSPEC_TILE(9),
    FRSPEC_TILE(10), FRSPEC_TILE(11), FRSPEC_TILE(12)
#undef FRSPEC_TILE
};
static_assert(Simd::kTileRows <= 12);

// The rows of one panel.
template <typename Weights>
void multiply_panel(const char* weights, const MultiplyTask& task, int64_t all_groups,
                    float* accumulators) {
  constexpr int64_t kOutputs = 2 * Simd::kLanes;
  const float* x = static_cast<const float*>(task.x);
  const int64_t tiles = (task.rows + Simd::kTileRows - 1) / Simd::kTileRows;
  if (tiles == 1) {
    const bool asks = task.rows >= kPrefetchRows * Weights::kGroup;
    const auto tile = (asks ? kRowTiles<Weights, 2> : kRowTiles<Weights, 0>)[task.rows];
    tile(weights, x, task.x_stride, all_groups, accumulators, task.accumulate,
         weights + kPrefetchBytes);
    return;
  }
  // Blocks of one size: the first two tiles ask for half a block each of the next.
  constexpr int64_t kStep = kStepGroups<Weights>;
  const int64_t most_groups = kBlockBytes / Weights::kGroupBytes;
  const int64_t blocks = (all_groups + most_groups - 1) / most_groups;
  const int64_t block_groups = ((all_groups + blocks - 1) / blocks + kStep - 1) / kStep * kStep;
  for (int64_t first = 0; first < all_groups; first += block_groups) {
    const int64_t left = all_groups - first;
    const int64_t groups = left < block_groups ? left : block_groups;
    const char* block = weights + first * Weights::kGroupBytes;
    const char* next = block + groups * Weights::kGroupBytes;
    for (int64_t row = 0, t = 0; t < tiles; ++t) {
      const int64_t m = task.rows / tiles + (t < task.rows % tiles ? 1 : 0);
      const auto tile = (t < 2 ? kRowTiles<Weights, 1> : kRowTiles<Weights, 0>)[m];
      tile(block, x + first + row * task.x_stride, task.x_stride, groups,
           accumulators + row * kOutputs, task.accumulate || first > 0, next);
      next += groups / kStep * 64;
      row += m;
    }
  }
}

template <typename Weights>
void multiply(const MultiplyTask& task) {
  constexpr int64_t kOutputs = 2 * Simd::kLanes;
  const int64_t groups = (task.depth + Weights::kGroup - 1) / Weights::kGroup;
  if (task.rows == 1) return multiply_row<Weights>(task, groups);
  for (int64_t p = 0; p < task.panels; ++p) {
    multiply_panel<Weights>(static_cast<const char*>(task.weights) + p * task.panel_bytes, task,
                            groups, task.accumulators + p * task.rows * kOutputs);
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
