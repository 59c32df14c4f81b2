#include <algorithm>

#include "check.h"
#include "cpu/cpu_backend.h"

namespace frspec::cpu {

void CpuBackend::rms_norm(const Tensor& out, const Tensor& x, const float* weight, float eps) {
  FRSPEC_CHECK(out.rows == x.rows && out.cols == x.cols && x.cols > 0, Error, "rms_norm: out [",
               out.rows, ", ", out.cols, "] and x [", x.rows, ", ", x.cols, "] differ");
  // Up to some ten thousand values waking the other threads costs more than it saves.
  const int64_t grain = std::max<int64_t>(1, 16384 / x.cols);
  pool_.parallel_for(x.rows, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      kernels_.rms_norm(out.row<float>(r), x.row<float>(r), weight, x.cols, eps);
    }
  });
}

}  // namespace frspec::cpu
