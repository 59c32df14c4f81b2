#include "tensor_map.h"

#include "launch.h"

namespace frspec::cuda {
namespace {

// Of the driver, which is not linked.
auto encoder() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const auto get = [&] {
      constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
      return cudaGetDriverEntryPointByVersion(kName, &found, 12000, cudaEnableDefault, &result);
#else
      return cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result);
#endif
    };
    check(get(), "looking for cuTensorMapEncodeTiled");
    FRSPEC_CHECK(result == cudaDriverEntryPointSuccess && found != nullptr, DeviceError,
                 "expected cuTensorMapEncodeTiled in the driver, found none");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

}  // namespace

CUtensorMap box_map(const void* data, DType dtype, int64_t rows, int64_t cols, int64_t stride,
                    int box_rows) {
  constexpr cuuint32_t kBoxColumns = 64;
  CUtensorMap map{};
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};  // bytes
  const cuuint32_t box[2] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = encoder()(
      &map,
      dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FRSPEC_CHECK(result == CUDA_SUCCESS, DeviceError, "a tensor map of [", rows, ", ", cols,
               "] with rows ", stride, " apart: cuTensorMapEncodeTiled returned ",
               static_cast<int>(result));
  return map;
}

}  // namespace frspec::cuda
