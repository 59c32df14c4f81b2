// Choosing a token as a pure function of (logits row, sampling parameters, seed, logical position):
// contract 2. At temperature 0 it is the arg max. Above, it is the arg max of logit / T + Gumbel
// noise over the tokens that top-k, top-p and min-p leave (Gumbel-max trick: that is a draw from
// the softmax). The noise comes from a counter-based generator keyed by seed, position and token,
// so it does not depend on what was drafted, on other rows, or on the order of evaluation.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace frspec {

// Filters apply in the order temperature, top-k, top-p, min-p, each to what the one before left.
struct Sampling {
  float temperature = 0.0f;  // >= 0; 0: arg max, the filters are without effect
  int32_t top_k = 0;         // keep the top_k likeliest tokens; 0: all
  float top_p = 1.0f;        // keep the likeliest tokens until their mass reaches top_p, in (0, 1]
  float min_p = 0.0f;  // keep tokens with probability >= min_p * that of the likeliest, in [0, 1]
  uint64_t seed = 0;
};

// Whether top-k, top-p or min-p may leave out a token.
FRSPEC_HOST_DEVICE inline bool filters(const Sampling& sampling, int64_t vocab) {
  return (sampling.top_k > 0 && sampling.top_k < vocab) || sampling.top_p < 1.0f ||
         sampling.min_p > 0.0f;
}

struct RandomBlock {
  uint32_t words[4];
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
// section 3.3).
FRSPEC_HOST_DEVICE inline RandomBlock philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                                             uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Random bits of the four tokens 4 block ... 4 block + 3 at a position.
FRSPEC_HOST_DEVICE inline RandomBlock token_noise_bits(uint64_t seed, int32_t position,
                                                       uint32_t block) {
  return philox(seed, block, static_cast<uint32_t>(position), 0, 0);
}

// Standard Gumbel noise from 32 random bits. v = 1 - u is uniform on (0, 1) with its fine steps
// near 0, where the noise is large and decides the draw.
FRSPEC_HOST_DEVICE inline float gumbel_noise(uint32_t bits) {
  float v = (static_cast<float>(bits) + 0.5f) * 2.3283064365386963e-10f;  // 2^-32
  const float below_one = 0.99999994f;
  if (v > below_one) v = below_one;
  return -logf(-log1pf(-v));
}

}  // namespace frspec
