// Matrix products: cuts them into groups of panels (and blocks of rows) for the threads.
#include <algorithm>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/workspace.h"

namespace frspec::cpu {
namespace {

void check_product(const char* op, const Tensor& out, const Tensor& x, const LinearWeight& w) {
  FRSPEC_CHECK(out.dtype == DType::kF32 && x.dtype == DType::kF32, Error, op,
               ": activations must be fp32");
  FRSPEC_CHECK(out.rows == x.rows && x.cols == w.in_features && out.cols == w.out_features, Error,
               op, ": out [", out.rows, ", ", out.cols, "] does not fit x [", x.rows, ", ", x.cols,
               "] and weight [", w.out_features, ", ", w.in_features, "]");
}

int64_t panel_bytes(const Kernels& kernels, const LinearWeight& w) {
  const PanelLayout& layout = kernels.layouts[static_cast<int>(w.dtype)];
  const int64_t depth = (w.in_features + layout.group - 1) / layout.group * layout.group;
  return kernels.panel * depth * static_cast<int64_t>(dtype_size(w.dtype));
}

}  // namespace

CpuBackend::PreparedRows CpuBackend::prepare_rows(const Tensor& x, DType weight_dtype) {
  if (!kernels_.prepares_rows[static_cast<int>(weight_dtype)]) return {x.data, x.stride};
  FRSPEC_CHECK(x.rows <= limits_.rows && x.cols <= limits_.in_features, Error, "linear: x [",
               x.rows, ", ", x.cols, "] exceeds the planned workspace [", limits_.rows, ", ",
               limits_.in_features, "]");
  const int64_t stride = prepared_stride(x.cols);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(x.cols, 1));
  pool_.parallel_for(x.rows, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      kernels_.prepare_row(prepared_rows_ + r * stride, x.row<float>(r), x.cols);
    }
  });
  return {prepared_rows_, stride};
}

// body(first row, rows, first panel, panels, accumulators) for all rows and panels. The tasks are
// small: the narrow layers of small models have no more than 18 panels to share out.
template <typename Body>
void CpuBackend::for_panel_groups(int64_t rows, int64_t panels, const Body& body) {
  const int64_t group = rows == 1 ? kernels_.row_panels : 1;
  const int64_t row_blocks = (rows + kLinearRowBlock - 1) / kLinearRowBlock;
  const int64_t row_block = row_blocks == 0 ? 0 : (rows + row_blocks - 1) / row_blocks;
  FRSPEC_CHECK(accumulator_count(row_block, kernels_) <= accumulators_per_thread_, Error,
               "linear: ", rows, " rows exceed the planned workspace of ", limits_.rows);
  const int64_t groups = (panels + group - 1) / group;
  pool_.parallel_for(groups * row_blocks, 1, [&](int64_t begin, int64_t end, int thread) {
    float* accumulators = accumulators_ + thread * accumulators_per_thread_;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_row = i % row_blocks * row_block;
      const int64_t first_panel = i / row_blocks * group;
      body(first_row, std::min(row_block, rows - first_row), first_panel,
           std::min(group, panels - first_panel), accumulators);
    }
  });
}

void CpuBackend::linear(const Tensor& out, const Tensor& x, const LinearWeight& w, Rows,
                        const Tensor* residual) {
  check_product("linear", out, x, w);
  FRSPEC_CHECK(residual == nullptr || (residual->dtype == DType::kF32 &&
                                       residual->rows == out.rows && residual->cols == out.cols),
               Error, "linear: the residual's shape differs from the output's [", out.rows, ", ",
               out.cols, "]");
  const int64_t panel = kernels_.panel;
  const int64_t bytes = panel_bytes(kernels_, w);
  const PreparedRows rows_in = prepare_rows(x, w.dtype);
  const auto multiply = kernels_.multiply[static_cast<int>(w.dtype)];
  const int64_t panels = (w.out_features + panel - 1) / panel;
  for_panel_groups(
      x.rows, panels,
      [&](int64_t first_row, int64_t rows, int64_t first_panel, int64_t count,
          float* accumulators) {
        multiply({static_cast<const char*>(w.data) + first_panel * bytes, bytes, count,
                  static_cast<const float*>(rows_in.data) + first_row * rows_in.stride,
                  rows_in.stride, rows, w.in_features, accumulators});
        for (int64_t p = 0; p < count; ++p) {
          const int64_t col = (first_panel + p) * panel;
          kernels_.finish(
              {out.row<float>(first_row) + col, out.stride, accumulators + p * rows * panel, rows,
               std::min(panel, w.out_features - col), w.bias == nullptr ? nullptr : w.bias + col,
               residual == nullptr ? nullptr : residual->row<float>(first_row) + col,
               residual == nullptr ? 0 : residual->stride});
        }
      });
}

void CpuBackend::linear_swiglu(const Tensor& out, const Tensor& x, const LinearWeight& gate,
                               const LinearWeight& up, Rows) {
  check_product("linear_swiglu", out, x, gate);
  check_product("linear_swiglu", out, x, up);
  FRSPEC_CHECK(gate.dtype == up.dtype, Error, "linear_swiglu: gate is ", dtype_name(gate.dtype),
               ", up is ", dtype_name(up.dtype));
  const int64_t panel = kernels_.panel;
  const int64_t bytes = panel_bytes(kernels_, gate);
  const PreparedRows rows_in = prepare_rows(x, gate.dtype);
  const auto multiply = kernels_.multiply[static_cast<int>(gate.dtype)];
  const int64_t panels = (gate.out_features + panel - 1) / panel;
  for_panel_groups(
      x.rows, panels,
      [&](int64_t first_row, int64_t rows, int64_t first_panel, int64_t count,
          float* accumulators) {
        const float* from = static_cast<const float*>(rows_in.data) + first_row * rows_in.stride;
        float* up_accumulators = accumulators + count * rows * panel;
        multiply({static_cast<const char*>(gate.data) + first_panel * bytes, bytes, count, from,
                  rows_in.stride, rows, gate.in_features, accumulators});
        multiply({static_cast<const char*>(up.data) + first_panel * bytes, bytes, count, from,
                  rows_in.stride, rows, up.in_features, up_accumulators});
        for (int64_t p = 0; p < count; ++p) {
          const int64_t col = (first_panel + p) * panel;
          kernels_.finish_swiglu(
              {out.row<float>(first_row) + col, out.stride, accumulators + p * rows * panel,
               up_accumulators + p * rows * panel, rows, std::min(panel, gate.out_features - col),
               gate.bias == nullptr ? nullptr : gate.bias + col,
               up.bias == nullptr ? nullptr : up.bias + col});
        }
      });
}

}  // namespace frspec::cpu
