// Names and descriptions of errors, as the CUDA runtime has them.
#include <cuda_runtime.h>

namespace {

struct ErrorText {
  cudaError_t error;
  const char* name;
  const char* description;
};

#define FRSPEC_EMULATION_ERROR(error, description) \
  { error, #error, description }
constexpr ErrorText kErrors[] = {
    FRSPEC_EMULATION_ERROR(cudaSuccess, "no error"),
    FRSPEC_EMULATION_ERROR(cudaErrorInvalidValue, "invalid argument"),
    FRSPEC_EMULATION_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    FRSPEC_EMULATION_ERROR(cudaErrorInitializationError, "initialization error"),
    FRSPEC_EMULATION_ERROR(cudaErrorCudartUnloading, "driver shutting down"),
    FRSPEC_EMULATION_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    FRSPEC_EMULATION_ERROR(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"),
    FRSPEC_EMULATION_ERROR(cudaErrorInsufficientDriver,
                           "CUDA driver version is insufficient for CUDA runtime version"),
    FRSPEC_EMULATION_ERROR(cudaErrorDevicesUnavailable,
                           "CUDA-capable device(s) is/are busy or unavailable"),
    FRSPEC_EMULATION_ERROR(cudaErrorInvalidDeviceFunction, "invalid device function"),
    FRSPEC_EMULATION_ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    FRSPEC_EMULATION_ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    FRSPEC_EMULATION_ERROR(cudaErrorNoKernelImageForDevice,
                           "no kernel image is available for execution on the device"),
    FRSPEC_EMULATION_ERROR(cudaErrorECCUncorrectable, "uncorrectable ECC error encountered"),
    FRSPEC_EMULATION_ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    FRSPEC_EMULATION_ERROR(cudaErrorIllegalState,
                           "the operation cannot be performed in the present state"),
    FRSPEC_EMULATION_ERROR(cudaErrorNotReady, "device not ready"),
    FRSPEC_EMULATION_ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    FRSPEC_EMULATION_ERROR(cudaErrorLaunchOutOfResources,
                           "too many resources requested for launch"),
    FRSPEC_EMULATION_ERROR(cudaErrorLaunchTimeout, "the launch timed out and was terminated"),
    FRSPEC_EMULATION_ERROR(cudaErrorMisalignedAddress, "misaligned address"),
    FRSPEC_EMULATION_ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    FRSPEC_EMULATION_ERROR(cudaErrorNotPermitted, "operation not permitted"),
    FRSPEC_EMULATION_ERROR(cudaErrorNotSupported, "operation not supported"),
    FRSPEC_EMULATION_ERROR(cudaErrorSystemDriverMismatch,
                           "system has unsupported display driver / cuda driver combination"),
    FRSPEC_EMULATION_ERROR(cudaErrorStreamCaptureUnsupported,
                           "operation not permitted when stream is capturing"),
    FRSPEC_EMULATION_ERROR(cudaErrorStreamCaptureInvalidated,
                           "operation failed due to a previous error during capture"),
    FRSPEC_EMULATION_ERROR(cudaErrorStreamCaptureMerge,
                           "operation would result in a merge of separate capture sequences"),
    FRSPEC_EMULATION_ERROR(cudaErrorStreamCaptureUnmatched,
                           "capture was not ended in the same stream as it began"),
    FRSPEC_EMULATION_ERROR(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    FRSPEC_EMULATION_ERROR(cudaErrorStreamCaptureIsolation,
                           "dependency created on uncaptured work in another stream"),
    FRSPEC_EMULATION_ERROR(
        cudaErrorStreamCaptureImplicit,
        "operation would make the legacy stream depend on a capturing blocking stream"),
    FRSPEC_EMULATION_ERROR(
        cudaErrorCapturedEvent,
        "operation not permitted on an event last recorded in a capturing stream"),
    FRSPEC_EMULATION_ERROR(
        cudaErrorStreamCaptureWrongThread,
        "attempt to terminate a thread-local capture sequence from another thread"),
    FRSPEC_EMULATION_ERROR(cudaErrorUnknown, "unknown error"),
};
#undef FRSPEC_EMULATION_ERROR

const ErrorText* find(cudaError_t error) {
  for (const ErrorText& text : kErrors) {
    if (text.error == error) return &text;
  }
  return nullptr;
}

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
  const ErrorText* text = find(error);
  return text == nullptr ? "unrecognized error code" : text->name;
}

const char* cudaGetErrorString(cudaError_t error) {
  const ErrorText* text = find(error);
  return text == nullptr ? "unrecognized error code" : text->description;
}
