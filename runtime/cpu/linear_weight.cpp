// Packed weights: placing rows into panels, gathering rows out of them, embedding.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/convert.h"
#include "cpu/cpu_backend.h"
#include "synthetic.h"

namespace frspec::cpu {
namespace {

// k per block: a block of the panel stays in the L1 cache while its rows are scattered into it.
constexpr int64_t kPackBlock = 64;

struct PackedMatrix {
  const PanelLayout& layout;
  int64_t panel;
  int64_t element_bytes;
  int64_t padded_depth;
  char* data;

  PackedMatrix(const Kernels& kernels, const LinearWeight& w)
      : layout(kernels.layouts[static_cast<int>(w.dtype)]),
        panel(kernels.panel),
        element_bytes(static_cast<int64_t>(dtype_size(w.dtype))),
        padded_depth((w.in_features + layout.group - 1) / layout.group * layout.group),
        data(static_cast<char*>(w.data)) {}

  // Element 0 of a row; element k is (k / group) step + k % group elements behind it.
  template <typename T>
  T* row(int64_t index) const {
    return reinterpret_cast<T*>(data) + index / panel * panel * padded_depth +
           layout.column[index % panel];
  }
  int64_t step() const { return panel * layout.group; }
  int64_t offset(int64_t k) const { return k / layout.group * step() + k % layout.group; }
};

template <typename T>
void scatter(const PackedMatrix& matrix, int64_t row, int64_t first_k, int64_t count,
             const T* source) {
  T* to = matrix.row<T>(row);
  if (matrix.layout.group == 1) {
    const int64_t step = matrix.panel;
    to += first_k * step;
    for (int64_t i = 0; i < count; ++i) to[i * step] = source[i];
  } else {
    for (int64_t i = 0; i < count; ++i) to[matrix.offset(first_k + i)] = source[i];
  }
}

template <typename T>
void gather(const PackedMatrix& matrix, int64_t row, int64_t first_k, int64_t count,
            T* destination) {
  const T* from = matrix.row<T>(row);
  if (matrix.layout.group == 1) {
    const int64_t step = matrix.panel;
    from += first_k * step;
    for (int64_t i = 0; i < count; ++i) destination[i] = from[i * step];
  } else {
    for (int64_t i = 0; i < count; ++i) destination[i] = from[matrix.offset(first_k + i)];
  }
}

void check_weight(const char* op, const LinearWeight& w) {
  FRSPEC_CHECK(is_float(w.dtype), Error, op, ": weights cannot be ", dtype_name(w.dtype));
  FRSPEC_CHECK(w.data != nullptr, Error, op, ": the weight has no memory");
}

}  // namespace

size_t CpuBackend::linear_bytes(DType dtype, int64_t out_features, int64_t in_features) const {
  FRSPEC_CHECK(is_float(dtype), Error, "weights cannot be ", dtype_name(dtype));
  const int64_t group = kernels_.layouts[static_cast<int>(dtype)].group;
  const int64_t rows = (out_features + kernels_.panel - 1) / kernels_.panel * kernels_.panel;
  const int64_t depth = (in_features + group - 1) / group * group;
  return static_cast<size_t>(rows * depth) * dtype_size(dtype);
}

void CpuBackend::load_linear(const LinearWeight& weight, int64_t first_row,
                             const Tensor& host_source) {
  check_weight("load_linear", weight);
  FRSPEC_CHECK(is_float(host_source.dtype) && host_source.cols == weight.in_features &&
                   first_row >= 0 && first_row + host_source.rows <= weight.out_features,
               Error, "load_linear: source ", dtype_name(host_source.dtype), " [", host_source.rows,
               ", ", host_source.cols, "] at row ", first_row, " does not fit weight [",
               weight.out_features, ", ", weight.in_features, "]");
  const PackedMatrix matrix(kernels_, weight);
  const int64_t end_row = first_row + host_source.rows;
  const int64_t first_panel = first_row / matrix.panel;
  const int64_t panels = (end_row + matrix.panel - 1) / matrix.panel - first_panel;
  const bool converts = host_source.dtype != weight.dtype;
  const int64_t source_bytes = static_cast<int64_t>(dtype_size(host_source.dtype));
  pool_.parallel_for(panels, 1, [&](int64_t begin, int64_t end, int) {
    uint32_t converted[kPackBlock];
    for (int64_t p = first_panel + begin; p < first_panel + end; ++p) {
      const int64_t row_begin = std::max(first_row, p * matrix.panel);
      const int64_t row_end = std::min(end_row, (p + 1) * matrix.panel);
      for (int64_t k = 0; k < weight.in_features; k += kPackBlock) {
        const int64_t count = std::min(kPackBlock, weight.in_features - k);
        for (int64_t row = row_begin; row < row_end; ++row) {
          const void* source = static_cast<const char*>(host_source.data) +
                               ((row - first_row) * host_source.stride + k) * source_bytes;
          if (converts) {
            convert(converted, weight.dtype, source, host_source.dtype, count);
            source = converted;
          }
          if (matrix.element_bytes == 2) {
            scatter(matrix, row, k, count, static_cast<const uint16_t*>(source));
          } else {
            scatter(matrix, row, k, count, static_cast<const uint32_t*>(source));
          }
        }
      }
    }
  });
}

void CpuBackend::fill_linear(const LinearWeight& weight, uint64_t seed) {
  constexpr int64_t kRows = 64;
  const int64_t cols = weight.in_features;
  const float scale = std::sqrt(3.0f / static_cast<float>(cols));
  std::vector<float> rows(static_cast<size_t>(kRows * cols));
  for (int64_t first = 0; first < weight.out_features; first += kRows) {
    const int64_t count = std::min(kRows, weight.out_features - first);
    pool_.parallel_for(count, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin * cols; i < end * cols; ++i) {
        rows[static_cast<size_t>(i)] = scale * synthetic_element(seed, first * cols + i);
      }
    });
    load_linear(weight, first, {rows.data(), DType::kF32, count, cols, cols});
  }
}

void CpuBackend::load_vector(float* destination, const Tensor& host_source) {
  FRSPEC_CHECK(is_float(host_source.dtype) && host_source.rows == 1, Error,
               "load_vector: expected a float vector, found ", dtype_name(host_source.dtype), " [",
               host_source.rows, ", ", host_source.cols, "]");
  convert(destination, DType::kF32, host_source.data, host_source.dtype, host_source.cols);
}

void CpuBackend::gather_linear(const LinearWeight& destination, const LinearWeight& source,
                               const int32_t* host_rows) {
  check_weight("gather_linear", destination);
  check_weight("gather_linear", source);
  FRSPEC_CHECK(destination.dtype == source.dtype && destination.in_features == source.in_features,
               Error, "gather_linear: cannot gather ", dtype_name(source.dtype), " rows of ",
               source.in_features, " into ", dtype_name(destination.dtype), " rows of ",
               destination.in_features);
  for (int64_t i = 0; i < destination.out_features; ++i) {
    FRSPEC_CHECK(host_rows[i] >= 0 && host_rows[i] < source.out_features, Error,
                 "gather_linear: row ", host_rows[i], " is outside [0, ", source.out_features, ")");
  }
  const PackedMatrix to(kernels_, destination);
  const PackedMatrix from(kernels_, source);
  const int64_t panels = (destination.out_features + to.panel - 1) / to.panel;
  const auto copy = [&](auto element, int64_t begin, int64_t end) {
    using T = decltype(element);
    T block[kPackBlock];
    for (int64_t k = 0; k < destination.in_features; k += kPackBlock) {
      const int64_t count = std::min(kPackBlock, destination.in_features - k);
      for (int64_t row = begin; row < end; ++row) {
        gather(from, host_rows[row], k, count, block);
        scatter(to, row, k, count, block);
      }
    }
  };
  pool_.parallel_for(panels, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row_end = std::min(destination.out_features, (p + 1) * to.panel);
      if (to.element_bytes == 2) {
        copy(uint16_t{}, p * to.panel, row_end);
      } else {
        copy(uint32_t{}, p * to.panel, row_end);
      }
    }
  });
}

void CpuBackend::embed(const Tensor& out, const LinearWeight& table, const int32_t* tokens) {
  check_weight("embed", table);
  FRSPEC_CHECK(out.dtype == DType::kF32 && out.cols == table.in_features, Error, "embed: out has ",
               out.cols, " columns, the table ", table.in_features);
  const PackedMatrix matrix(kernels_, table);
  pool_.parallel_for(out.rows, 8, [&](int64_t begin, int64_t end, int) {
    uint32_t block[kPackBlock];
    for (int64_t r = begin; r < end; ++r) {
      // An id outside the table is a bug of the caller, but not a reason to read foreign memory.
      const int64_t token = std::clamp<int64_t>(tokens[r], 0, table.out_features - 1);
      for (int64_t k = 0; k < out.cols; k += kPackBlock) {
        const int64_t count = std::min(kPackBlock, out.cols - k);
        if (matrix.element_bytes == 2) {
          gather(matrix, token, k, count, reinterpret_cast<uint16_t*>(block));
        } else {
          gather(matrix, token, k, count, block);
        }
        convert(out.row<float>(r) + k, DType::kF32, block, table.dtype, count);
      }
    }
  });
}

}  // namespace frspec::cpu
