// What can go wrong with a device: each is a typed exception that names CUDA's error and what was
// being done, the process lives, and the next request works or says why it cannot. The failures are
// the emulation's; on a device these tests have nothing to do.
#ifdef FRSPEC_EMULATE_CUDA
#include <algorithm>

#include "cuda_backend.h"
#include "cuda_test_support.h"
#include "emulation_config.h"
#include "engine.h"
#include "engine_driver.h"
#include "tiny_model.h"

namespace frspec {

std::unique_ptr<Backend> make_cuda_backend(int device);

namespace cuda {
namespace {

constexpr test::TinySizes kSizes{211, 72, 136, 2, 6, 2, 24};
const std::vector<int32_t> kPrompt = {3, 14, 15, 92, 65};

// The emulated device as it was, whatever a test did to it.
class Restored {
 public:
  Restored() : config_(emulation::config()) {}
  ~Restored() {
    emulation::reset_device();
    emulation::config() = config_;
  }

 private:
  emulation::Config config_;
};

EngineOptions tiny_options() {
  EngineOptions options;
  options.model = test::write_predictable_target("cuda_errors_target", kSizes);
  options.drafter = test::write_predictable_drafter("cuda_errors_drafter", kSizes);
  options.device = "cuda";
  options.dtype = "bf16";
  options.max_context = 128;
  options.tree = {2, 3, 6};
  return options;
}

std::vector<int32_t> generate(Engine& engine) {
  return test::generate(engine, kPrompt, test::make_request(Method::kEagle2, {}, 12));
}

}  // namespace

TEST_CASE("a machine without a usable device is refused by name") {
  const Restored restored;
  emulation::Config& config = emulation::config();
  SUBCASE("no driver") {
    config.driver_version = 0;
    CHECK_THROWS_WITH_AS(make_cuda_backend(0), doctest::Contains("no NVIDIA driver was found"),
                         DeviceError);
  }
  SUBCASE("too old a driver") {
    config.driver_version = 11080;
    CHECK_THROWS_WITH_AS(make_cuda_backend(0), doctest::Contains("supports CUDA 11.8"),
                         DeviceError);
  }
  SUBCASE("no GPU") {
    config.device_count = 0;
    CHECK_THROWS_WITH_AS(make_cuda_backend(0), doctest::Contains("sees no NVIDIA GPU"),
                         DeviceError);
  }
  SUBCASE("no device of that number") {
    config.device_count = 2;
    CHECK_THROWS_WITH_AS(make_backend("cuda:2", 0), doctest::Contains("sees 2 (cuda:0 to cuda:1)"),
                         DeviceError);
  }
  SUBCASE("a compute capability without kernels") {
    config.compute_major = 7;
    config.compute_minor = 5;
    CHECK_THROWS_WITH_AS(make_cuda_backend(0), doctest::Contains("compute capability 7.5"),
                         DeviceError);
  }
  SUBCASE("a device that cannot be used") {
    emulation::fail_next("cudaSetDevice", cudaErrorDevicesUnavailable);
    CHECK_THROWS_WITH_AS(make_cuda_backend(0), doctest::Contains("cudaErrorDevicesUnavailable"),
                         DeviceError);
  }
  SUBCASE("auto takes the CPU") {
    config.driver_version = 0;
    CHECK(make_backend("auto", 1)->info().name == "cpu");
  }
  SUBCASE("auto takes the CPU where the GPU has no room for a context") {
    emulation::fail_next("cudaSetDevice", cudaErrorMemoryAllocation);
    CHECK(make_backend("auto", 1)->info().name == "cpu");
  }
  SUBCASE("and the next one works") {
    CHECK(make_cuda_backend(0)->info().name == "cuda:0");
    CHECK(make_backend("auto", 1)->info().name == "cuda:0");
  }
}

TEST_CASE("too little device memory is an error that says which context would fit") {
  const Restored restored;
  Engine plan(tiny_options());
  emulation::config().device_bytes = kReserveBytes + plan.plan().total_bytes() - 1;
  Engine engine(tiny_options());
  CHECK_THROWS_WITH_AS(engine.load(), doctest::Contains("bytes are available"), MemoryPlanError);
  emulation::config().device_bytes = kReserveBytes + plan.plan().total_bytes();
  engine.load();
  CHECK(generate(engine).size() == 12);
}

TEST_CASE("an allocation that the device refuses leaves the engine to be loaded again") {
  const Restored restored;
  for (const char* call : {"cudaMalloc", "cudaMallocHost"}) {
    CAPTURE(call);
    Engine engine(tiny_options());
    emulation::fail_next(call, cudaErrorMemoryAllocation);
    CHECK_THROWS_WITH_AS(engine.load(), doctest::Contains("cudaErrorMemoryAllocation"),
                         MemoryPlanError);
    engine.load();
    CHECK(generate(engine).size() == 12);
  }
}

TEST_CASE("a cuBLAS that cannot be set up is an error, and is tried again") {
  const Restored restored;
  for (const char* call :
       {"cublasCreate", "cublasSetStream", "cublasSetWorkspace", "cublasSetMathMode"}) {
    CAPTURE(call);
    Engine engine(tiny_options());
    constexpr int kExecutionFailed = 13;
    constexpr int kAllocFailed = 3;
    emulation::fail_next(call, static_cast<cudaError_t>(kExecutionFailed));
    CHECK_THROWS_WITH_AS(engine.load(), doctest::Contains(": CUBLAS_STATUS_EXECUTION_FAILED"),
                         DeviceError);
    emulation::fail_next(call, static_cast<cudaError_t>(kAllocFailed));
    CHECK_THROWS_WITH_AS(engine.load(), doctest::Contains(": CUBLAS_STATUS_ALLOC_FAILED"),
                         MemoryPlanError);
    engine.load();
    CHECK(generate(engine).size() == 12);
  }
}

TEST_CASE("a call that fails once is an error of its request alone") {
  const Restored restored;
  Engine engine(tiny_options());
  engine.load();
  const auto expected = generate(engine);
  for (const char* call : {"cudaStreamSynchronize", "cudaLaunchKernelEx", "cudaMemcpyAsync",
                           "cudaGraphLaunch", "cudaEventRecordWithFlags"}) {
    for (const int after : {0, 3}) {
      CAPTURE(call);
      CAPTURE(after);
      emulation::fail_next(call, cudaErrorUnknown, after);
      bool thrown = false;
      for (int request = 0; request < 4 && !thrown; ++request) {
        try {
          generate(engine);
        } catch (const DeviceError& error) {
          thrown = true;
          CHECK(std::string(error.what()).find("cudaErrorUnknown") != std::string::npos);
        }
      }
      CHECK(thrown);
      CHECK(generate(engine) == expected);
    }
  }
}

TEST_CASE("a graph that cannot be recorded or made is an error, and is tried again") {
  const Restored restored;
  for (const char* call : {"cudaStreamBeginCapture", "cudaGraphInstantiate"}) {
    CAPTURE(call);
    Engine engine(tiny_options());
    engine.load();
    emulation::fail_next(call, cudaErrorMemoryAllocation);
    CHECK_THROWS_WITH(generate(engine), doctest::Contains("cudaErrorMemoryAllocation"));
    CHECK(generate(engine).size() == 12);
  }
}

TEST_CASE("after a kernel's failure the error says that this process is done with the GPU") {
  const Restored restored;
  Engine engine(tiny_options());
  engine.load();
  emulation::fail_next("cudaStreamSynchronize", cudaErrorLaunchFailure);
  CHECK_THROWS_WITH_AS(
      generate(engine),
      doctest::Contains("cudaErrorLaunchFailure (unspecified launch failure); this process cannot"),
      DeviceError);
}

}  // namespace cuda
}  // namespace frspec
#endif
