#include "cpu/cpu_backend.h"

#include <algorithm>
#include <atomic>
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

double CpuBackend::measure_bandwidth() {
  typedef uint64_t Vector __attribute__((vector_size(64), may_alias));
  constexpr int kSums = 8;
  constexpr int64_t kChunk = 1 << 20;
  constexpr int64_t kVectors = kChunk / static_cast<int64_t>(sizeof(Vector));
  constexpr int64_t kMostChunks = 768;
  const int64_t chunks =
      std::min<int64_t>(kMostChunks, static_cast<int64_t>(memory_.bytes()) / kChunk);
  FRSPEC_CHECK(chunks > 0, Error, "measure_bandwidth: there is no memory to read");
  const auto* data = static_cast<const Vector*>(memory_.data());
  std::atomic<uint64_t> total{0};  // so that the sums must be computed
  const Clock::time_point start = Clock::now();
  pool_.parallel_for(chunks, 4, [&](int64_t begin, int64_t end, int) {
    Vector sum[kSums] = {};
    for (int64_t i = begin * kVectors; i < end * kVectors; i += kSums) {
      for (int u = 0; u < kSums; ++u) sum[u] += data[i + u];
    }
    for (int u = 1; u < kSums; ++u) sum[0] += sum[u];
    total += sum[0][0] + sum[0][1];
  });
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return static_cast<double>(chunks * kChunk) / seconds;
}

std::unique_ptr<Backend> make_cpu_backend(int threads, const Kernels* kernels) {
  FRSPEC_CHECK(threads >= 0 && threads <= kMaxThreads, RequestError,
               "threads must be between 0 (all) and ", kMaxThreads, ", found ", threads);
  if (threads == 0) threads = usable_threads();
  return std::make_unique<CpuBackend>(threads, kernels != nullptr ? *kernels : choose_kernels());
}

}  // namespace frspec::cpu
