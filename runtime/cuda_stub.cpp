// Stands in for the CUDA backend in a build without CUDA.
#include <memory>

#include "backend.h"
#include "check.h"

namespace frspec {

std::unique_ptr<Backend> make_cuda_backend() {
  throw DeviceError("device 'cuda' was asked for, but this build has no CUDA");
}

}  // namespace frspec
