#include "check.h"
#include "cpu/cpu_backend.h"

namespace frspec::cpu {

void CpuBackend::add_silu(const Tensor& x, const Tensor& y) {
  FRSPEC_CHECK(x.rows == y.rows && x.cols == y.cols && x.cols > 0, Error, "add_silu: x [", x.rows,
               ", ", x.cols, "] and y [", y.rows, ", ", y.cols, "] differ");
  pool_.parallel_for(x.rows, row_grain(x.cols), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      kernels_.add_silu(x.row<float>(r), y.row<float>(r), x.cols);
    }
  });
}

}  // namespace frspec::cpu
