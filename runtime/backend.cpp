#include "backend.h"

#include "check.h"
#include "cpu/cpu_backend.h"

namespace frspec {

std::unique_ptr<Backend> make_cuda_backend();  // cuda/, or cuda_stub.cpp

std::unique_ptr<Backend> make_backend(const std::string& device, int threads) {
  if (device == "cpu" || device == "auto") return cpu::make_cpu_backend(threads);
  if (device == "cuda") return make_cuda_backend();
  throw RequestError(concat("device must be 'cpu', 'cuda' or 'auto', found '", device, "'"));
}

}  // namespace frspec
