// Reproducible random numbers for tests.
#pragma once

#include <cstdint>
#include <random>

namespace frspec::test {

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  float normal(float scale = 1.0f) { return scale * normal_(engine_); }
  int64_t below(int64_t bound) {
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(bound));
  }
  double uniform() { return std::uniform_real_distribution<double>()(engine_); }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_;
};

}  // namespace frspec::test
