// Random weights of true shapes, for models whose weights cannot be had: a folder with a
// config.json that has "frspec_synthetic_seed" and no tensors. What such a model writes means
// nothing; how long it takes to write it does.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "sampling.h"

namespace frspec {

// Uniform in [-1, 1), from seed and element alone: the same weights on every backend.
FRSPEC_HOST_DEVICE inline float synthetic_element(uint64_t seed, int64_t index) {
  const auto block = static_cast<uint64_t>(index) / 4;
  const RandomBlock bits =
      philox(seed, static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 1, 0);
  return static_cast<float>(bits.words[index % 4] >> 8) * 0x1p-23f - 1.0f;
}

}  // namespace frspec
