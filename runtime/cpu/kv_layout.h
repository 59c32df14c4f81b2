// Where the CPU backend's KV cache keeps the elements of a key/value head, so that attention reads
// them as the weights of its products, in the order in which they lie in memory.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace frspec::cpu {

// Models in bf16 where the attention kernel is bf16_attention(): panels of kKvPanel outputs by
// pairs, as the weights of vdpbf16ps. Offsets in elements.
//   keys    [slots / kKvPanel, D / 2, kKvPanel, 2]: pairs of elements of D
//   values  [slots / kKvBlock, panels of D, kKvBlock / 2, kKvPanel, 2]: pairs of slots
struct PairedKv {
  using Element = uint16_t;
  static constexpr int64_t kKeyRun = 2;  // elements of a key that lie beside each other

  static constexpr int64_t head_elements(int64_t slots, int64_t head_dim) {
    return slots * ((head_dim + kKvPanel - 1) / kKvPanel * kKvPanel);
  }
  static constexpr int64_t key(int64_t head_dim, int64_t slot, int64_t d) {
    return slot / kKvPanel * kKvPanel * head_dim + d / 2 * 2 * kKvPanel + slot % kKvPanel * 2 +
           d % 2;
  }
  static constexpr int64_t value(int64_t head_dim, int64_t slot, int64_t d) {
    const int64_t block = head_elements(kKvBlock, head_dim);
    return slot / kKvBlock * block + d / kKvPanel * kKvPanel * kKvBlock +
           slot % kKvBlock / 2 * 2 * kKvPanel + d % kKvPanel * 2 + slot % 2;
  }
};

// All others.
//   keys    [slots / kKvBlock, D, kKvBlock]
//   values  [slots, D]
struct PlainKv {
  using Element = float;
  static constexpr int64_t kKeyRun = 1;

  static constexpr int64_t head_elements(int64_t slots, int64_t head_dim) {
    return slots * head_dim;
  }
  static constexpr int64_t key(int64_t head_dim, int64_t slot, int64_t d) {
    return slot / kKvBlock * kKvBlock * head_dim + d * kKvBlock + slot % kKvBlock;
  }
  static constexpr int64_t value(int64_t head_dim, int64_t slot, int64_t d) {
    return slot * head_dim + d;
  }
};

}  // namespace frspec::cpu
