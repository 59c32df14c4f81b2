// The emulated runtime API: graphs, events, errors, devices, cuBLAS.
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "check.h"
#include "cublas.h"
#include "test_support.h"

namespace emulation {
namespace {

using frspec::cuda::bf16;
using frspec::cuda::CublasApi;
using frspec::cuda::dependency_wait;
using frspec::cuda::fp16;
using frspec::cuda::from_float;
using frspec::cuda::to_float;

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

class Graph {
 public:
  // Captures what body() puts into the stream.
  Graph(const Stream& stream, const std::function<void()>& body) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin");
    body();
    check(cudaStreamEndCapture(stream, &graph_), "end");
    check(cudaGraphInstantiate(&executable_, graph_, 0), "instantiate");
    check(cudaGraphUpload(executable_, stream), "upload");
  }
  ~Graph() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(const Stream& stream) const { check(cudaGraphLaunch(executable_, stream), "launch"); }
  size_t nodes() const {
    size_t count = 0;
    check(cudaGraphGetNodes(graph_, nullptr, &count), "nodes");
    return count;
  }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

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
      launch<add>(one_block(32, stream), "add", sum.data(),
                  static_cast<const int*>(twice.data()), static_cast<const int*>(thrice.data()));
      check(cudaMemcpyAsync(result.data(), sum.data(), 128, cudaMemcpyDeviceToHost, stream), "out");
      check(cudaEventRecordWithFlags(end, stream, cudaEventRecordExternal), "end");
    });
    CHECK(graph.nodes() == 7);
    float milliseconds = -1;
    CHECK(cudaEventElapsedTime(&milliseconds, start, end) == cudaErrorInvalidResourceHandle);
    for (const int value : {1, 10}) {
      host[3] = value;
      graph.launch(stream);
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
    graph.launch(stream);
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
                       "cudaErrorLaunchOutOfResources (too many resources requested for launch): "
                       "trap",
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
  config().device_bytes = size_t{64} << 30;
  void* kept = nullptr;
  check(cudaMalloc(&kept, 1 << 20), "kept");
  // One large allocation would be filled; many of them walk through the range all the same.
  const Stream stream;
  const DeviceArray<int> in(counting(32));
  for (int i = 0; i < 40; ++i) {
    void* p = nullptr;
    check(cudaMalloc(&p, 1 << 20), "again");
    check(cudaFree(p), "free");
  }
  CHECK(in.download(stream) == counting(32));
}

TEST_CASE("the device that is pretended") {
  const FreshDevice fresh;
  config().multiprocessors = 132;
  config().compute_major = 9;
  config().compute_minor = 0;
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "properties");
  CHECK(properties.multiProcessorCount == 132);
  CHECK(properties.major == 9);
  CHECK(properties.sharedMemPerBlockOptin == config().shared_bytes_per_block);
  CHECK(std::strlen(properties.name) > 0);
  const auto attribute = [](cudaDeviceAttr which) {
    int value = -1;
    check(cudaDeviceGetAttribute(&value, which, 0), "attribute");
    return value;
  };
  CHECK(attribute(cudaDevAttrMultiProcessorCount) == 132);
  CHECK(attribute(cudaDevAttrComputeCapabilityMajor) == 9);
  CHECK(attribute(cudaDevAttrComputeCapabilityMinor) == 0);
  CHECK(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) == 99 << 10);
  CHECK(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) == 100 << 10);
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

// ---- cuBLAS

template <typename T>
std::vector<T> sequence(int count, float step) {
  std::vector<T> values;
  for (int i = 0; i < count; ++i) {
    values.push_back(from_float<T>(step * static_cast<float>(i % 17 - 8)));
  }
  return values;
}

template <typename In, typename Out>
void check_gemm(cudaDataType_t in_type, cudaDataType_t out_type, bool transpose_a,
                bool transpose_b) {
  const CublasApi& api = frspec::cuda::cublas_api();
  constexpr int m = 5, n = 7, k = 9, lda = 11, ldb = 12, ldc = 6;
  const Stream stream;
  const auto a = sequence<In>(lda * 9, 0.25f);
  const auto b = sequence<In>(ldb * 9, 0.5f);
  const auto old = sequence<Out>(ldc * n, 1.0f);
  const DeviceArray<In> device_a(a), device_b(b);
  const DeviceArray<Out> c(old);
  void* handle = nullptr;
  REQUIRE(api.create(&handle) == 0);
  REQUIRE(api.set_stream(handle, stream) == 0);
  const float alpha = 2, beta = 0.5f;
  const auto multiply = [&] {
    REQUIRE(api.gemm_ex(handle, transpose_a ? 1 : 0, transpose_b ? 1 : 0, m, n, k, &alpha,
                        device_a.data(), in_type, lda, device_b.data(), in_type, ldb, &beta,
                        c.data(), out_type, ldc, frspec::cuda::kCublasCompute32F,
                        frspec::cuda::kCublasDefaultAlgorithm) == 0);
  };
  const Graph graph(stream, multiply);
  CHECK(to_float(c.download(stream)[3]) == to_float(old[3]));
  graph.launch(stream);
  const auto found = c.download(stream);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int q = 0; q < k; ++q) {
        sum += static_cast<double>(to_float(a[static_cast<size_t>(transpose_a ? i * lda + q
                                                                              : q * lda + i)])) *
               to_float(b[static_cast<size_t>(transpose_b ? q * ldb + j : j * ldb + q)]);
      }
      const auto at = static_cast<size_t>(j * ldc + i);
      CHECK(to_float(found[at]) ==
            to_float(from_float<Out>(static_cast<float>(2 * sum + 0.5 * to_float(old[at])))));
    }
  }
  CHECK(to_float(found[m]) == to_float(old[m]));  // behind the column
  CHECK(api.destroy(handle) == 0);
}

TEST_CASE("cuBLAS: products of all types") {
  const FreshDevice fresh;
  for (const bool transpose_a : {false, true}) {
    for (const bool transpose_b : {false, true}) {
      check_gemm<bf16, bf16>(CUDA_R_16BF, CUDA_R_16BF, transpose_a, transpose_b);
      check_gemm<bf16, float>(CUDA_R_16BF, CUDA_R_32F, transpose_a, transpose_b);
      check_gemm<fp16, fp16>(CUDA_R_16F, CUDA_R_16F, transpose_a, transpose_b);
      check_gemm<float, float>(CUDA_R_32F, CUDA_R_32F, transpose_a, transpose_b);
    }
  }
}

TEST_CASE("cuBLAS: bad arguments") {
  const FreshDevice fresh;
  const CublasApi& api = frspec::cuda::cublas_api();
  const DeviceArray<float> matrix(64);
  void* handle = nullptr;
  REQUIRE(api.create(&handle) == 0);
  const float one = 1;
  const auto status = [&](int lda, int ldb, int ldc, cudaDataType_t a_type, int compute) {
    return api.gemm_ex(handle, 1, 0, 4, 4, 8, &one, matrix.data(), a_type, lda, matrix.data(),
                       CUDA_R_32F, ldb, &one, matrix.data(), CUDA_R_32F, ldc, compute, -1);
  };
  CHECK(status(8, 8, 4, CUDA_R_32F, 68) == 0);
  CHECK(status(7, 8, 4, CUDA_R_32F, 68) == 7);
  CHECK(status(8, 7, 4, CUDA_R_32F, 68) == 7);
  CHECK(status(8, 8, 3, CUDA_R_32F, 68) == 7);
  CHECK(status(8, 8, 4, CUDA_R_16BF, 68) == 15);
  CHECK(status(8, 8, 4, CUDA_R_8I, 68) == 15);
  CHECK(status(8, 8, 4, CUDA_R_32F, 64) == 15);
  CHECK(api.set_stream(nullptr, nullptr) == 1);
  CHECK(api.set_workspace(handle, matrix.data(), 256) == 0);
  CHECK(api.set_workspace(handle, matrix.data(), 512) == 7);
  CHECK_THROWS_AS(status(40, 8, 4, CUDA_R_32F, 68), Error);
  CHECK(api.destroy(handle) == 0);
}

// ---- configuration from the environment

// Run by the next test in a process of its own.
TEST_CASE("configuration as the environment says" * doctest::skip()) {
  CHECK(config().order == Order::kRandom);
  CHECK(config().seed == 17);
  CHECK(config().copies == Copies::kEager);
  CHECK(config().streams == Streams::kImmediate);
  CHECK(config().kernel_errors == KernelErrors::kSticky);
  CHECK(config().threads == 3);
  CHECK(config().device_bytes == 12345);
  CHECK(config().compute_major == 12);
  void* p = nullptr;
  check(cudaMalloc(&p, 1), "first");
  CHECK(cudaMalloc(&p, 1) == cudaErrorMemoryAllocation);
}

Outcome run_with(const std::string& settings) {
  std::array<char, 4096> path{};
  REQUIRE(readlink("/proc/self/exe", path.data(), path.size() - 1) > 0);
  return run_in_child([&] {
    const std::string command = "env " + settings + " '" + path.data() +
                                "' --no-skip --test-case='configuration as the environment says'";
    return std::system(command.c_str()) == 0;
  });
}

TEST_CASE("configuration from the environment") {
  const std::string good =
      "FRSPEC_EMULATION_ORDER=random:17 FRSPEC_EMULATION_COPIES=eager "
      "FRSPEC_EMULATION_STREAMS=immediate FRSPEC_EMULATION_ERRORS=sticky "
      "FRSPEC_EMULATION_THREADS=3 FRSPEC_EMULATION_DEVICE_BYTES=12345 "
      "FRSPEC_EMULATION_COMPUTE=12.0 FRSPEC_EMULATION_FAIL=cudaMalloc:2:1";
  const Outcome read = run_with(good);
  INFO(read.output);
  CHECK(read.status == 0);
  const Outcome refused = run_with(good + " FRSPEC_EMULATION_ORDER=sideways");
  CHECK(refused.status != 0);
  CHECK(refused.output.find("found 'sideways'") != std::string::npos);
}

}  // namespace
}  // namespace emulation
