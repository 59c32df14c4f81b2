#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <fstream>

#include "check.h"

namespace frspec::cpu {
namespace {

constexpr int kMaxThreads = 1024;

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "CPU";
}

}  // namespace

CpuBackend::CpuBackend(int threads, const Kernels& kernels) : kernels_(kernels), pool_(threads) {}

DeviceInfo CpuBackend::info() const {
  return {"cpu", concat(processor_name(), ", ", kernels_.name, ", ", pool_.threads(), " threads"),
          available_memory()};
}

void* CpuBackend::allocate(size_t bytes) {
  memory_ = HostMemory();
  memory_ = HostMemory(bytes);
  return memory_.data();
}

void CpuBackend::upload(void* destination, const void* host_source, size_t bytes) {
  if (bytes > 0) std::memcpy(destination, host_source, bytes);
}

void CpuBackend::download(void* host_destination, const void* source, size_t bytes) {
  if (bytes > 0) std::memcpy(host_destination, source, bytes);
}

void CpuBackend::post(const void* source, size_t bytes) {
  FRSPEC_CHECK(bytes <= kMailboxBytes, Error, "post: ", bytes, " bytes, at most ", kMailboxBytes,
               " are possible");
  std::memcpy(mailbox_, source, bytes);
}

void CpuBackend::mark(int stamp) { marks_[stamp] = Clock::now(); }

double CpuBackend::seconds_between(int first, int second) const {
  return std::chrono::duration<double>(marks_[second] - marks_[first]).count();
}

std::unique_ptr<Backend> make_cpu_backend(int threads, const Kernels* kernels) {
  FRSPEC_CHECK(threads >= 0 && threads <= kMaxThreads, RequestError,
               "threads must be between 0 (all) and ", kMaxThreads, ", found ", threads);
  if (threads == 0) threads = usable_threads();
  return std::make_unique<CpuBackend>(threads, kernels != nullptr ? *kernels : choose_kernels());
}

}  // namespace frspec::cpu
