// The emulated runtime API: graphs, events, errors, devices.
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cublas.h"
#include "device_memory.h"
#include "test_support.h"

namespace emulation {
namespace {

using frspec::cuda::dependency_wait;

__global__ void scale(int* out, const int* in, int factor) {
  dependency_wait();
  out[threadIdx.x] = in[threadIdx.x] * factor;
}
__global__ void add(int* out, const int* a, const int* b) {
  dependency_wait();
  out[threadIdx.x] = a[threadIdx.x] + b[threadIdx.x];
}
__global__ void trap(int*) {
  dependency_wait();
  __trap();
}

void launch_scale(const Stream& stream, int* out, const int* in, int factor) {
  launch<scale>(one_block(32, stream), "scale", out, in, factor);
}

TEST_CASE("graphs: branches, new inputs, times of events inside") {
  for (const Streams mode : {Streams::kLazy, Streams::kImmediate}) {
    const FreshDevice fresh;
    config().streams = mode;
    const Stream stream, side;
    const Event fork(cudaEventDisableTiming), join(cudaEventDisableTiming), start, end;
    const PinnedArray<int> host(32), result(32);
    const DeviceArray<int> in(32), twice(32), thrice(32), sum(32);
    const Graph graph(stream, [&] {
      check(cudaEventRecordWithFlags(start, stream, cudaEventRecordExternal), "start");
      check(cudaMemcpyAsync(in.data(), host.data(), 128, cudaMemcpyHostToDevice, stream), "in");
      check(cudaEventRecord(fork, stream), "fork");
      check(cudaStreamWaitEvent(side, fork, 0), "fork");
      launch_scale(stream, twice.data(), in.data(), 2);
      launch_scale(side, thrice.data(), in.data(), 3);
      check(cudaEventRecord(join, side), "join");
      check(cudaStreamWaitEvent(stream, join, 0), "join");
      launch<add>(one_block(32, stream), "add", sum.data(), static_cast<const int*>(twice.data()),
                  static_cast<const int*>(thrice.data()));
      check(cudaMemcpyAsync(result.data(), sum.data(), 128, cudaMemcpyDeviceToHost, stream), "out");
      check(cudaEventRecordWithFlags(end, stream, cudaEventRecordExternal), "end");
    });
    CHECK(graph.nodes() == 7);
    float milliseconds = -1;
    CHECK(cudaEventElapsedTime(&milliseconds, start, end) == cudaErrorInvalidResourceHandle);
    for (const int value : {1, 10}) {
      host[3] = value;
      graph.replay(stream);
      if (mode == Streams::kLazy) {
        CHECK(cudaEventElapsedTime(&milliseconds, start, end) == cudaErrorNotReady);
      }
      check(cudaEventSynchronize(end), "wait");
      CHECK(result[3] == 5 * value);
      milliseconds = -1;
      CHECK(cudaEventElapsedTime(&milliseconds, start, end) == cudaSuccess);
      CHECK(milliseconds >= 0);
    }
  }
}

TEST_CASE("graphs: destroyed while a launch is queued") {
  const FreshDevice fresh;
  config().streams = Streams::kLazy;
  const Stream stream;
  const DeviceArray<int> in(counting(32)), out(32);
  {
    const Graph graph(stream, [&] { launch_scale(stream, out.data(), in.data(), 2); });
    graph.replay(stream);
  }
  CHECK(out.download(stream)[5] == 10);
}

TEST_CASE("captures: states and refusals") {
  const FreshDevice fresh;
  const Stream stream, other;
  const Event event;
  cudaGraph_t graph = nullptr;
  cudaStreamCaptureStatus status;
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorIllegalState);
  check(cudaEventRecord(event, other), "outside");

  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin");
  check(cudaStreamIsCapturing(stream, &status), "status");
  CHECK(status == cudaStreamCaptureStatusActive);
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaErrorIllegalState);
  int* p = nullptr;
  CHECK(cudaMalloc(&p, 4) == cudaErrorStreamCaptureUnsupported);
  check(cudaStreamIsCapturing(stream, &status), "status");
  CHECK(status == cudaStreamCaptureStatusInvalidated);
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);

  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "begin");
  check(cudaMalloc(&p, 4), "allowed in a relaxed capture");
  check(cudaEventRecord(event, stream), "captured");
  CHECK(cudaEventSynchronize(event) == cudaErrorCapturedEvent);
  CHECK(cudaEventQuery(event) == cudaErrorCapturedEvent);
  check(cudaStreamEndCapture(stream, &graph), "end");
  check(cudaGraphDestroy(graph), "destroy");
  CHECK(cudaGraphDestroy(graph) == cudaErrorInvalidValue);
  check(cudaFree(p), "free");
}

TEST_CASE("events: between streams, queries, times") {
  const FreshDevice fresh;
  const Stream first, second;
  const Event event, later;
  const DeviceArray<int> in(counting(32)), between(32), out(32);
  CHECK(cudaEventQuery(event) == cudaSuccess);  // not recorded yet
  check(cudaEventRecord(event, first), "record");
  launch_scale(first, between.data(), in.data(), 2);
  check(cudaEventRecord(later, first), "record");
  check(cudaStreamWaitEvent(second, later, 0), "wait");
  launch_scale(second, out.data(), between.data(), 3);
  CHECK(out.download(second)[4] == 24);
  CHECK(cudaEventQuery(later) == cudaSuccess);
  float milliseconds = -1;
  CHECK(cudaEventElapsedTime(&milliseconds, event, later) == cudaSuccess);
  CHECK(milliseconds >= 0);
  launch_scale(first, between.data(), in.data(), 2);
  int queries = 0;
  while (cudaStreamQuery(first) == cudaErrorNotReady) ++queries;
  CHECK(queries <= 2);
  CHECK(cudaGetLastError() == cudaSuccess);
}

TEST_CASE("failures on demand") {
  const FreshDevice fresh;
  void* p = nullptr;
  fail_next("cudaMalloc", cudaErrorMemoryAllocation, 1);
  check(cudaMalloc(&p, 64), "the first");
  void* q = nullptr;
  CHECK(cudaMalloc(&q, 64) == cudaErrorMemoryAllocation);
  CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
  CHECK(cudaGetLastError() == cudaSuccess);
  check(cudaMalloc(&q, 64), "the third");

  const Stream stream;
  fail_next("cudaLaunchKernelEx", cudaErrorLaunchOutOfResources);
  CHECK_THROWS_WITH_AS(launch<trap>(one_block(32, stream), "trap", static_cast<int*>(p)),
                       "trap: cudaErrorLaunchOutOfResources (too many resources requested for "
                       "launch)",
                       frspec::DeviceError);
  fail_next("cudaStreamSynchronize", cudaErrorUnknown);
  fail_next("cudaStreamCreateWithFlags", cudaErrorDevicesUnavailable);
  CHECK(cudaStreamSynchronize(stream) == cudaErrorUnknown);
  cudaStream_t other = nullptr;
  CHECK(cudaStreamCreateWithFlags(&other, 0) == cudaErrorDevicesUnavailable);
  fail_next("cublasCreate", static_cast<cudaError_t>(3));
  void* handle = nullptr;
  CHECK(frspec::cuda::cublas_api().create(&handle) == 3);

  fail_next("cudaMalloc", cudaErrorMemoryAllocation);
  reset_device();
  CHECK(cudaMalloc(&p, 64) == cudaSuccess);
}

TEST_CASE("sticky errors, until the device is reset") {
  const FreshDevice fresh;
  config().kernel_errors = KernelErrors::kSticky;
  {
    const Stream stream;
    const DeviceArray<int> out(32);
    const PinnedArray<int> host(32);
    const Event event;
    // The message on stderr is checked in a child.
    expect_noticed("__trap()", [&] {
      config().kernel_errors = KernelErrors::kSticky;
      launch<trap>(one_block(32, stream), "trap", out.data());
      return cudaStreamSynchronize(stream) != cudaErrorLaunchFailure;
    });
    fail_next("cudaEventRecord", cudaErrorLaunchFailure);
    CHECK(cudaEventRecord(event, stream) == cudaErrorLaunchFailure);
    CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
    CHECK(cudaGetLastError() == cudaSuccess);  // failures on demand are not sticky

    const auto quiet = run_in_child([&] {
      config().kernel_errors = KernelErrors::kSticky;
      config().streams = Streams::kLazy;
      launch<trap>(one_block(32, stream), "trap", out.data());
      bool right = cudaDeviceSynchronize() == cudaErrorLaunchFailure;
      void* p = nullptr;
      right = right && cudaMalloc(&p, 4) == cudaErrorLaunchFailure;
      right = right && cudaGetLastError() == cudaErrorLaunchFailure;
      right = right && cudaGetLastError() == cudaErrorLaunchFailure;
      right = right && cudaMemcpyAsync(host.data(), out.data(), 128, cudaMemcpyDeviceToHost,
                                       stream) == cudaErrorLaunchFailure;
      right = right && cudaEventSynchronize(event) == cudaErrorLaunchFailure;
      right = right && cudaDeviceReset() == cudaErrorLaunchFailure;
      reset_device();
      right = right && cudaGetLastError() == cudaSuccess && cudaMalloc(&p, 4) == cudaSuccess;
      // Handles of before are refused, not followed.
      right = right && cudaStreamSynchronize(stream) == cudaErrorInvalidResourceHandle;
      right = right && cudaEventQuery(event) == cudaErrorInvalidResourceHandle;
      return right && cudaFree(out.data()) == cudaErrorInvalidValue;
    });
    INFO(quiet.output);
    CHECK(quiet.status == 0);
  }
}

TEST_CASE("out of memory") {
  const FreshDevice fresh;
  config().device_bytes = 1 << 20;
  size_t free_bytes = 0;
  size_t total = 0;
  check(cudaMemGetInfo(&free_bytes, &total), "info");
  CHECK(total == 1 << 20);
  CHECK(free_bytes == total);
  void* p = nullptr;
  void* q = nullptr;
  CHECK(cudaMalloc(&p, (1 << 20) + 1) == cudaErrorMemoryAllocation);
  CHECK(p == nullptr);
  check(cudaMalloc(&p, 600 << 10), "first");
  CHECK(cudaMalloc(&q, 600 << 10) == cudaErrorMemoryAllocation);
  check(cudaMemGetInfo(&free_bytes, &total), "info");
  CHECK(free_bytes == (1 << 20) - (600 << 10));
  check(cudaFree(p), "free");
  check(cudaMalloc(&q, 600 << 10), "second");
  check(cudaFree(q), "free");
  CHECK(cudaFree(q) == cudaErrorInvalidValue);
  config().device_bytes = size_t{1} << 50;
  CHECK(cudaMalloc(&p, size_t{1} << 49) == cudaErrorMemoryAllocation);
}

TEST_CASE("addresses of freed memory are used again when the others are used up") {
  const FreshDevice fresh;
  use_up_device_addresses();  // now the search begins with the lowest ones
  const Stream stream;
  const DeviceArray<int> first(counting(32));
  void* gap = nullptr;
  check(cudaMalloc(&gap, 8192), "gap");
  const DeviceArray<int> second(counting(32, 100));
  check(cudaFree(gap), "free");
  void* p = nullptr;
  check(cudaMalloc(&p, 8192), "as long as there are others");
  CHECK(p != gap);
  use_up_device_addresses();
  void* large = nullptr;
  check(cudaMalloc(&large, 3 << 20), "behind all");
  check(cudaMalloc(&p, 4096), "behind it");
  use_up_device_addresses();
  check(cudaMalloc(&p, 8192), "in the gap");
  CHECK(p == gap);
  check(cudaMemset(p, 0, 8192), "use it");
  check(cudaMemset(large, 0, 3 << 20), "use it");
  CHECK(first.download(stream) == counting(32));
  CHECK(second.download(stream) == counting(32, 100));
}

TEST_CASE("the device that is pretended") {
  const FreshDevice fresh;
  config().multiprocessors = 132;
  config().compute_major = 8;
  config().compute_minor = 9;
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "properties");
  CHECK(properties.multiProcessorCount == 132);
  CHECK(properties.major == 8);
  CHECK(properties.sharedMemPerBlockOptin == config().shared_bytes_per_block);
  CHECK(std::strlen(properties.name) > 0);
  const auto attribute = [](cudaDeviceAttr which) {
    int value = -1;
    check(cudaDeviceGetAttribute(&value, which, 0), "attribute");
    return value;
  };
  CHECK(attribute(cudaDevAttrMultiProcessorCount) == 132);
  CHECK(attribute(cudaDevAttrComputeCapabilityMajor) == 8);
  CHECK(attribute(cudaDevAttrComputeCapabilityMinor) == 9);
  CHECK(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) == 227 << 10);
  CHECK(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) == 228 << 10);
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "version");
  CHECK(version == CUDART_VERSION);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(scale)), "function");
  CHECK(attributes.maxThreadsPerBlock == 1024);
  CHECK(cudaSetDevice(0) == cudaSuccess);
  CHECK(cudaSetDevice(1) == cudaErrorInvalidDevice);
  config().device_count = 2;
  CHECK(cudaSetDevice(1) == cudaSuccess);
  check(cudaSetDevice(0), "device");
}

TEST_CASE("machines that cannot run CUDA") {
  const FreshDevice fresh;
  int count = -1;
  void* p = nullptr;
  config().device_count = 0;
  CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice);
  CHECK(count == 0);
  CHECK(cudaMalloc(&p, 4) == cudaErrorNoDevice);
  config().device_count = 1;
  config().driver_version = 12040;
  int version = 0;
  check(cudaDriverGetVersion(&version), "version");
  CHECK(version == 12040);
  CHECK(cudaGetDeviceCount(&count) == cudaErrorInsufficientDriver);
  config().driver_version = 0;
  CHECK(cudaSetDevice(0) == cudaErrorInsufficientDriver);
  config().driver_version = CUDART_VERSION;
  config().compute_major = 7;
  const Stream stream;
  CHECK_THROWS_AS(launch<trap>(one_block(32, stream), "trap", static_cast<int*>(nullptr)),
                  frspec::DeviceError);
  CHECK(cudaGetLastError() == cudaErrorNoKernelImageForDevice);
}

TEST_CASE("names of errors") {
  CHECK(std::string(cudaGetErrorName(cudaErrorMemoryAllocation)) == "cudaErrorMemoryAllocation");
  CHECK(std::string(cudaGetErrorString(cudaErrorMemoryAllocation)) == "out of memory");
  CHECK(std::string(cudaGetErrorName(cudaErrorStreamCaptureUnjoined)) ==
        "cudaErrorStreamCaptureUnjoined");
  CHECK(std::string(cudaGetErrorName(static_cast<cudaError_t>(998))) == "unrecognized error code");
}

TEST_CASE("what is alive is counted") {
  const FreshDevice fresh;
  CHECK(live_objects() == 0);
  {
    const Stream stream;
    const Event event;
    const DeviceArray<int> in(counting(32)), out(32);
    const PinnedArray<int> host(32);
    const Graph graph(stream, [&] { launch_scale(stream, out.data(), in.data(), 2); });
    CHECK(live_objects() == 7);
  }
  CHECK(live_objects() == 0);
}

TEST_CASE("host functions and memory in the order of a stream") {
  const FreshDevice fresh;
  const Stream stream;
  const DeviceArray<int> in(counting(32)), out(32);
  struct Seen {
    const int* host;
    int value;
  };
  const PinnedArray<int> host(32);
  Seen seen{host.data(), 0};
  void* temporary = nullptr;
  check(cudaMallocAsync(&temporary, 128, stream), "allocate");
  launch_scale(stream, static_cast<int*>(temporary), in.data(), 2);
  launch_scale(stream, out.data(), static_cast<const int*>(temporary), 2);
  check(cudaFreeAsync(temporary, stream), "free");
  check(cudaMemcpyAsync(host.data(), out.data(), 128, cudaMemcpyDeviceToHost, stream), "copy");
  const auto look = [](void* p) {
    auto* s = static_cast<Seen*>(p);
    s->value = s->host[7];
  };
  check(cudaLaunchHostFunc(stream, look, &seen), "host function");
  stream.synchronize();
  CHECK(seen.value == 28);
}

}  // namespace
}  // namespace emulation
