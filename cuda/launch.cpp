#include "launch.h"

#include <cstdlib>
#include <cstring>

namespace frspec::cuda {
namespace {

// Failures after which CUDA refuses everything in this process.
bool is_final(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
      return true;
    default:
      return false;
  }
}

// Static and dynamic shared memory that a kernel may have without asking.
constexpr size_t kUnaskedSharedBytes = size_t{48} << 10;

bool overlap_is_wanted() {
  const char* setting = std::getenv("FRSPEC_PDL");
  return setting == nullptr || std::strcmp(setting, "0") != 0;
}

}  // namespace

void throw_cuda_error(cudaError_t error, const char* doing) {
  const std::string message =
      concat(doing, ": ", cudaGetErrorName(error), " (", cudaGetErrorString(error), ")");
  if (error == cudaErrorMemoryAllocation) throw MemoryPlanError(message);
  throw DeviceError(is_final(error) ? message + "; this process cannot use the GPU any more"
                                    : message);
}

int device_attribute(cudaDeviceAttr attribute, const char* doing) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device), doing);
  check(cudaDeviceGetAttribute(&value, attribute, device), doing);
  return value;
}

const KernelState& prepare_kernel(KernelState (&states)[kMaxDevices], const void* kernel,
                                  size_t shared_bytes, const char* name) {
  int device = 0;
  check(cudaGetDevice(&device), name);
  FRSPEC_CHECK(device < kMaxDevices, DeviceError, "expected a device below cuda:", kMaxDevices,
               ", found cuda:", device);
  KernelState& state = states[device];
  if (!state.known) {
    constexpr int kFirstPtxWithOverlap = 90;
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), name);
    state.overlaps = attributes.ptxVersion >= kFirstPtxWithOverlap && overlap_is_wanted();
    state.allowed_bytes = kUnaskedSharedBytes - attributes.sharedSizeBytes;
    state.known = true;
  }
  if (shared_bytes > state.allowed_bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
    state.allowed_bytes = shared_bytes;
  }
  return state;
}

}  // namespace frspec::cuda
