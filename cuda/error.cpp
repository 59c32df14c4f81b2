#include "launch.h"

namespace frspec::cuda {

void throw_cuda_error(cudaError_t error, const char* doing) {
  const std::string message =
      concat(doing, ": ", cudaGetErrorName(error), " (", cudaGetErrorString(error), ")");
  if (error == cudaErrorMemoryAllocation) throw MemoryPlanError(message);
  throw DeviceError(message);
}

}  // namespace frspec::cuda
