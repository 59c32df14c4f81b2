#include "check.h"
#include "cpu/cpu_backend.h"

namespace frspec::cpu {

void CpuBackend::rms_norm(const Tensor& out, const Tensor& x, const float* weight, float eps) {
  FRSPEC_CHECK(out.rows == x.rows && out.cols == x.cols && x.cols > 0, Error, "rms_norm: out [",
               out.rows, ", ", out.cols, "] and x [", x.rows, ", ", x.cols, "] differ");
  check_output("rms_norm", out);
  const bool rounds = out.dtype == DType::kBF16;
  FRSPEC_CHECK(!rounds || x.cols <= limits_.in_features, Error, "rms_norm: x [", x.rows, ", ",
               x.cols, "] exceeds the planned workspace of ", limits_.in_features, " columns");
  pool_.parallel_for(x.rows, row_grain(x.cols), [&](int64_t begin, int64_t end, int thread) {
    for (int64_t r = begin; r < end; ++r) {
      float* to = rounds ? rows_to_round_ + thread * limits_.in_features : out.row<float>(r);
      kernels_.rms_norm(to, x.row<float>(r), weight, x.cols, eps);
      if (rounds) kernels_.round_rows(out.row<uint16_t>(r), 0, to, 0, 1, x.cols);
    }
  });
}

}  // namespace frspec::cpu
