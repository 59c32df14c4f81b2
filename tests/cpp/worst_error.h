// The greatest of many errors.
#pragma once

#include <cmath>

namespace frspec::test {

// A NaN stays: std::max(worst, error) would take it for no error.
inline void keep_worst(double& worst, double error) {
  if (error > worst || std::isnan(error)) worst = error;
}

}  // namespace frspec::test
