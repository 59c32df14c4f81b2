#include "cpu/kernels.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"

namespace frspec::cpu {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

// Best first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> all;
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  // Every CPU with AVX2 converts fp16 too (F16C).
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  all.push_back({kernels_avx512_bf16(), avx512 && __builtin_cpu_supports("avx512bf16")});
  all.push_back({kernels_avx512(), avx512});
  all.push_back({kernels_avx2(), avx2});
#endif
  all.push_back({kernels_portable(), true});
  return all;
}

}  // namespace

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> supported;
  for (const Candidate& candidate : candidates()) {
    if (candidate.supported) supported.push_back(candidate.kernels);
  }
  return supported;
}

const Kernels& choose_kernels() {
  const char* wanted = std::getenv("FRSPEC_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *supported_kernels().front();
  std::string known;
  for (const Candidate& candidate : candidates()) {
    known += concat(known.empty() ? "" : ", ", candidate.kernels->name);
    if (wanted != std::string(candidate.kernels->name)) continue;
    FRSPEC_CHECK(candidate.supported, DeviceError, "FRSPEC_CPU_ISA is ", wanted,
                 ", which this CPU cannot run");
    return *candidate.kernels;
  }
  throw DeviceError(concat("FRSPEC_CPU_ISA must be one of ", known, "; found ", wanted));
}

}  // namespace frspec::cpu
