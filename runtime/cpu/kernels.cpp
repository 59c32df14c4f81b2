#include "cpu/kernels.h"

#include <cstdlib>
#include <string>

#include "check.h"

namespace frspec::cpu {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

}  // namespace

const Kernels& choose_kernels() {
  const Candidate candidates[] = {
#if defined(__x86_64__)
    {kernels_avx512_bf16(),
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16")},
    {kernels_avx512(), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512dq")},
    {kernels_avx2(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("f16c")},
#endif
    {kernels_portable(), true},
  };
  const char* wanted = std::getenv("FRSPEC_CPU_ISA");
  std::string known;
  for (const Candidate& candidate : candidates) {
    if (wanted == nullptr || *wanted == '\0') {
      if (candidate.supported) return *candidate.kernels;
      continue;
    }
    known += concat(known.empty() ? "" : ", ", candidate.kernels->name);
    if (wanted != std::string(candidate.kernels->name)) continue;
    FRSPEC_CHECK(candidate.supported, DeviceError, "FRSPEC_CPU_ISA is ", wanted,
                 ", which this CPU cannot run");
    return *candidate.kernels;
  }
  throw DeviceError(concat("FRSPEC_CPU_ISA must be one of ", known, "; found ", wanted));
}

}  // namespace frspec::cpu
