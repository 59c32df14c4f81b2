// Matrix products: cuts them into runs of panels (and blocks of rows) for the threads.
#include <algorithm>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/workspace.h"

namespace frspec::cpu {
namespace {

void check_product(const char* op, const Tensor& out, const Tensor& x, const LinearWeight& w) {
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

void CpuBackend::check_output(const char* op, const Tensor& out) const {
  const bool rounds = out.dtype == DType::kBF16 && kernels_.round_rows != nullptr;
  FRSPEC_CHECK(out.dtype == DType::kF32 || rounds, Error, op, ": ", kernels_.name,
               " writes no activations in ", dtype_name(out.dtype));
  FRSPEC_CHECK(!rounds || out.stride % 2 == 0, Error, op,
               ": expected rows of whole 32-bit units, found ", out.stride, " bf16 elements");
}

CpuBackend::InputRows CpuBackend::input_rows(const Tensor& x, DType weight_dtype) {
  FRSPEC_CHECK(x.dtype == DType::kF32 || x.dtype == input_dtype(weight_dtype), Error,
               "linear: ", kernels_.name, " reads no activations in ", dtype_name(x.dtype),
               " for weights in ", dtype_name(weight_dtype));
  if (x.dtype == DType::kBF16) {
    FRSPEC_CHECK(x.stride % 2 == 0, Error, "linear: expected rows of whole 32-bit units, found ",
                 x.stride, " bf16 elements");
    return {x.data, x.stride / 2};
  }
  if (input_dtype(weight_dtype) == DType::kF32) return {x.data, x.stride};
  FRSPEC_CHECK(x.rows <= limits_.rows && x.cols <= limits_.in_features, Error, "linear: x [",
               x.rows, ", ", x.cols, "] exceeds the planned workspace [", limits_.rows, ", ",
               limits_.in_features, "]");
  const int64_t stride = rounded_stride(x.cols);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(x.cols, 1));
  pool_.parallel_for(x.rows, grain, [&](int64_t begin, int64_t end, int) {
    kernels_.round_rows(rounded_rows_ + begin * stride, stride, x.row<float>(begin), x.stride,
                        end - begin, x.cols);
  });
  return {rounded_rows_, stride / 2};
}

// body(first row, rows, first panel, panels, accumulators) for all rows and panels. What threads
// share out are single panels: the narrow layers of small models have no more than 18.
template <typename Body>
void CpuBackend::for_panel_runs(int64_t rows, int64_t panels, const Body& body) {
  FRSPEC_CHECK(rows <= limits_.rows, Error, "linear: ", rows,
               " rows exceed the planned workspace of ", limits_.rows);
  const int64_t row_blocks = (rows + kLinearRowBlock - 1) / kLinearRowBlock;
  int64_t row_block = rows;
  if (row_blocks > 1) {
    row_block = (rows + row_blocks - 1) / row_blocks;
    row_block = (row_block + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
  }
  const int64_t run = row_blocks == 1 ? panel_run(rows, kernels_) : 1;
  pool_.parallel_for(panels * row_blocks, 1, [&](int64_t begin, int64_t end, int thread) {
    float* accumulators = accumulators_ + thread * accumulators_per_thread_;
    for (int64_t i = begin; i < end; i += run) {
      const int64_t first_row = i % row_blocks * row_block;
      body(first_row, std::min(row_block, rows - first_row), i / row_blocks, std::min(run, end - i),
           accumulators);
    }
  });
}

void CpuBackend::linear(const Tensor& out, const Tensor& x, const LinearWeight& w, Rows,
                        const Tensor* residual) {
  check_product("linear", out, x, w);
  FRSPEC_CHECK(out.dtype == DType::kF32, Error, "linear: expected an output in fp32, found ",
               dtype_name(out.dtype));
  FRSPEC_CHECK(residual == nullptr || (residual->dtype == DType::kF32 &&
                                       residual->rows == out.rows && residual->cols == out.cols),
               Error, "linear: the residual's shape differs from the output's [", out.rows, ", ",
               out.cols, "]");
  const int64_t panel = kernels_.panel;
  const int64_t bytes = panel_bytes(kernels_, w);
  const InputRows rows_in = input_rows(x, w.dtype);
  const auto multiply = kernels_.multiply[static_cast<int>(w.dtype)];
  const int64_t panels = (w.out_features + panel - 1) / panel;
  for_panel_runs(
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
  check_output("linear_swiglu", out);
  FRSPEC_CHECK(gate.dtype == up.dtype, Error, "linear_swiglu: gate is ", dtype_name(gate.dtype),
               ", up is ", dtype_name(up.dtype));
  const int64_t panel = kernels_.panel;
  const int64_t bytes = panel_bytes(kernels_, gate);
  const InputRows rows_in = input_rows(x, gate.dtype);
  const auto multiply = kernels_.multiply[static_cast<int>(gate.dtype)];
  const int64_t panels = (gate.out_features + panel - 1) / panel;
  const bool rounds = out.dtype == DType::kBF16;
  const auto body = [&](int64_t first_row, int64_t rows, int64_t first_panel, int64_t count,
                        float* accumulators) {
    const float* from = static_cast<const float*>(rows_in.data) + first_row * rows_in.stride;
    float* up_accumulators = accumulators + count * rows * panel;
    multiply({static_cast<const char*>(gate.data) + first_panel * bytes, bytes, count, from,
              rows_in.stride, rows, gate.in_features, accumulators});
    multiply({static_cast<const char*>(up.data) + first_panel * bytes, bytes, count, from,
              rows_in.stride, rows, up.in_features, up_accumulators});
    for (int64_t p = 0; p < count; ++p) {
      const int64_t col = (first_panel + p) * panel;
      const int64_t cols = std::min(panel, gate.out_features - col);
      float* sums = accumulators + p * rows * panel;
      kernels_.finish_swiglu({rounds ? sums : out.row<float>(first_row) + col,
                              rounds ? panel : out.stride, sums, up_accumulators + p * rows * panel,
                              rows, cols, gate.bias == nullptr ? nullptr : gate.bias + col,
                              up.bias == nullptr ? nullptr : up.bias + col});
      if (rounds) {
        kernels_.round_rows(out.row<uint16_t>(first_row) + col, out.stride, sums, panel, rows,
                            cols);
      }
    }
  };
  for_panel_runs(x.rows, panels, body);
}

}  // namespace frspec::cpu
