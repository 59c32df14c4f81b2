// Memory, devices and the choice of the instruction set.
#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>

#include "backend.h"
#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/host_memory.h"

namespace frspec::cpu {

TEST_CASE("memory is zero-filled, aligned and refused when there is too little") {
  HostMemory memory(5 << 20);
  const char* bytes = static_cast<const char*>(memory.data());
  CHECK(reinterpret_cast<uintptr_t>(bytes) % (2 << 20) == 0);
  int64_t nonzero = 0;
  for (size_t i = 0; i < memory.bytes(); ++i) nonzero += bytes[i] == 0 ? 0 : 1;
  CHECK(nonzero == 0);
  CHECK(available_memory() > memory.bytes());
  CHECK_THROWS_AS(HostMemory(size_t{1} << 60), MemoryPlanError);
  CHECK_THROWS_AS(HostMemory(available_memory() + (size_t{1} << 30)), MemoryPlanError);
}

TEST_CASE("devices are made by name") {
  const auto backend = make_backend("cpu", 2);
  CHECK(backend->info().name == "cpu");
  CHECK(backend->activation_dtype(DType::kBF16) == DType::kF32);
  CHECK(make_backend("auto", 1) != nullptr);
  CHECK_THROWS_AS(make_backend("tpu", 1), RequestError);
  void* memory = backend->allocate(1 << 16);
  const char text[] = "as it was";
  backend->upload(memory, text, sizeof(text));
  char back[sizeof(text)];
  backend->download(back, memory, sizeof(text));
  CHECK(std::strcmp(text, back) == 0);
}

TEST_CASE("the instruction set can be named, and an unknown one is refused") {
  const char* before = std::getenv("FRSPEC_CPU_ISA");
  const std::string saved = before == nullptr ? "" : before;
  setenv("FRSPEC_CPU_ISA", "portable", 1);
  CHECK(std::string(choose_kernels().name) == "portable");
  setenv("FRSPEC_CPU_ISA", "sse9", 1);
  CHECK_THROWS_AS(choose_kernels(), DeviceError);
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx512bf16")) {
    setenv("FRSPEC_CPU_ISA", "avx512_bf16", 1);
    CHECK_THROWS_AS(choose_kernels(), DeviceError);
  }
#endif
  if (before == nullptr) {
    unsetenv("FRSPEC_CPU_ISA");
  } else {
    setenv("FRSPEC_CPU_ISA", saved.c_str(), 1);
  }
}

}  // namespace frspec::cpu
