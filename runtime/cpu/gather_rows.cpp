#include <algorithm>
#include <cstring>

#include "check.h"
#include "cpu/cpu_backend.h"

namespace frspec::cpu {

void CpuBackend::gather_rows(const Tensor& out, const Tensor& src, const int32_t* rows) {
  FRSPEC_CHECK(out.cols == src.cols && out.dtype == src.dtype && (src.rows > 0 || out.rows == 0),
               Error, "gather_rows: [", out.rows, ", ", out.cols, "] cannot come from [", src.rows,
               ", ", src.cols, "]");
  const size_t bytes = static_cast<size_t>(src.cols) * dtype_size(src.dtype);
  for (int64_t r = 0; r < out.rows; ++r) {
    // A row outside is a bug of the caller, but not a reason to read foreign memory.
    const int64_t row = std::clamp<int64_t>(rows[r], 0, src.rows - 1);
    std::memcpy(out.row_slice(r, 1).data, src.row_slice(row, 1).data, bytes);
  }
}

}  // namespace frspec::cpu
