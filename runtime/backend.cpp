#include "backend.h"

#include <charconv>

#include "check.h"
#include "cpu/cpu_backend.h"

namespace frspec {

// cuda/cuda_backend.cpp, or cuda_stub.cpp in a build without CUDA.
std::unique_ptr<Backend> make_cuda_backend(int device);

namespace {

// N of "cuda:N", 0 of "cuda"; -1: neither.
int cuda_device(const std::string& device) {
  if (device == "cuda") return 0;
  if (device.rfind("cuda:", 0) != 0) return -1;
  int number = -1;
  const char* end = device.data() + device.size();
  const auto result = std::from_chars(device.data() + 5, end, number);
  return result.ec == std::errc() && result.ptr == end ? number : -1;
}

}  // namespace

std::unique_ptr<Backend> make_backend(const std::string& device, int threads) {
  if (device == "auto") {
    try {
      return make_cuda_backend(0);
    } catch (const DeviceError&) {
      return cpu::make_cpu_backend(threads);
    } catch (const MemoryPlanError&) {  // a GPU without room for so much as a context
      return cpu::make_cpu_backend(threads);
    }
  }
  if (device == "cpu") return cpu::make_cpu_backend(threads);
  const int number = cuda_device(device);
  FRSPEC_CHECK(number >= 0, RequestError,
               "device must be 'cpu', 'cuda', 'cuda:N' or 'auto', found '", device, "'");
  return make_cuda_backend(number);
}

}  // namespace frspec
