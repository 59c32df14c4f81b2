// Stands in for the CUDA backend in a build without CUDA.
#include <memory>
#include <string>

#include "backend.h"
#include "check.h"

namespace frspec {

std::unique_ptr<Backend> make_cuda_backend(int) {
  throw DeviceError("this build has no CUDA: " FRSPEC_NO_CUDA_REASON);
}

std::string cuda_build() { return "none: " FRSPEC_NO_CUDA_REASON; }

}  // namespace frspec
