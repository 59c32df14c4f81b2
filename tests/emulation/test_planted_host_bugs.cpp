// Deliberate bugs in how the host uses the device: each must be noticed.
#include <vector>

#include "test_support.h"

namespace emulation {
namespace {

using frspec::cuda::dependency_wait;

__global__ void fill(int* out, int value) {
  dependency_wait();
  out[threadIdx.x] = value;
}
__global__ void add_one(int* out, const int* in) {
  dependency_wait();
  out[threadIdx.x] = in[threadIdx.x] + 1;
}

__global__ void trap(int*) {
  dependency_wait();
  __trap();
}

void launch_fill(const Stream& stream, int* out, int value) {
  launch<fill>(one_block(32, stream), "fill", out, value);
}
void launch_add(const Stream& stream, int* out, const int* in) {
  launch<add_one>(one_block(32, stream), "add", out, in);
}

TEST_CASE("planted: host pointer as argument") {
  expect_noticed("argument 1 is no device pointer", [] {
    const Stream stream;
    const DeviceArray<int> out(32);
    const std::vector<int> in(32);
    launch_add(stream, out.data(), in.data());
    stream.synchronize();
    return true;
  });
}

TEST_CASE("planted: freed pointer as argument") {
  expect_noticed("no device pointer", [] {
    const Stream stream;
    const DeviceArray<int> out(32);
    const int* freed = DeviceArray<int>(32).data();
    launch_add(stream, out.data(), freed);
    return true;
  });
}

TEST_CASE("planted: memory that a graph uses is freed") {
  expect_noticed("no device pointer", [] {
    const Stream stream;
    const DeviceArray<int> out(32);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    {
      const DeviceArray<int> in(counting(32));
      check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin");
      launch_add(stream, out.data(), in.data());
      check(cudaStreamEndCapture(stream, &graph), "end");
      check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
    }
    check(cudaGraphLaunch(executable, stream), "launch");
    stream.synchronize();
    return true;
  });
}

TEST_CASE("planted: the host reads device memory") {
  if (kThreadSanitizer) return;
  expect_noticed(kAddressSanitizer ? "SEGV" : "host code touches device memory", [] {
    const Stream stream;
    const DeviceArray<int> out(32);
    launch_fill(stream, out.data(), 1);
    stream.synchronize();
    return *const_cast<volatile int*>(out.data()) == 1;
  });
}

TEST_CASE("planted: copy beyond the end of an allocation") {
  expect_noticed("the destination is not inside one allocation", [] {
    const DeviceArray<int> out(32);
    const std::vector<int> values(40);
    check(cudaMemcpy(out.data(), values.data(), 160, cudaMemcpyHostToDevice), "copy");
    return true;
  });
}

TEST_CASE("planted: copy in the wrong direction") {
  expect_noticed("direction", [] {
    const DeviceArray<int> in(32);
    std::vector<int> values(32);
    check(cudaMemcpy(values.data(), in.data(), 128, cudaMemcpyHostToDevice), "copy");
    return true;
  });
}

TEST_CASE("planted: more shared memory than a block may have") {
  expect_noticed("cudaErrorInvalidValue", [] {
    const Stream stream;
    const DeviceArray<int> out(32);
    launch<fill>(one_block(32, stream, config().shared_bytes_per_block + 1024), "fill", out.data(),
                 1);
    return true;
  });
}

TEST_CASE("planted: a block that is too large") {
  expect_noticed("cudaErrorInvalidConfiguration", [] {
    const Stream stream;
    const DeviceArray<int> out(2048);
    launch<fill>(one_block(2048, stream), "fill", out.data(), 1);
    return true;
  });
}

TEST_CASE("planted: missing event between two streams") {
  expect_noticed(kWrongResult, [] {
    const Stream first;
    const Stream second;
    const DeviceArray<int> between(counting(32));
    const DeviceArray<int> out(32);
    launch_fill(first, between.data(), 7);
    launch_add(second, out.data(), between.data());
    return out.download(second)[5] == 8;
  });
}

TEST_CASE("planted: missing dependency between branches of a graph") {
  expect_noticed(kWrongResult, [] {
    const Stream first;
    const Stream second;
    const Event fork(cudaEventDisableTiming);
    const Event join(cudaEventDisableTiming);
    const DeviceArray<int> between(counting(32));
    const DeviceArray<int> out(32);
    check(cudaStreamBeginCapture(first, cudaStreamCaptureModeGlobal), "begin");
    check(cudaEventRecord(fork, first), "fork");  // too early
    check(cudaStreamWaitEvent(second, fork, 0), "fork");
    launch_fill(first, between.data(), 7);
    launch_add(second, out.data(), between.data());
    check(cudaEventRecord(join, second), "join");
    check(cudaStreamWaitEvent(first, join, 0), "join");
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    check(cudaStreamEndCapture(first, &graph), "end");
    check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
    check(cudaGraphLaunch(executable, first), "launch");
    return out.download(first)[5] == 8;
  });
}

TEST_CASE("planted: pinned buffer is read before the copy is waited for") {
  expect_noticed(kWrongResult, [] {
    const Stream stream;
    const DeviceArray<int> in(counting(32));
    const PinnedArray<int> host(32);
    check(cudaMemcpyAsync(host.data(), in.data(), 128, cudaMemcpyDeviceToHost, stream), "copy");
    const int found = host[1];
    stream.synchronize();
    return found == 1;
  });
}

TEST_CASE("planted: pinned buffer is overwritten before the copy has read it") {
  expect_noticed(kWrongResult, [] {
    const Stream stream;
    const DeviceArray<int> out(32);
    const PinnedArray<int> host(32);
    host[0] = 1;
    check(cudaMemcpyAsync(out.data(), host.data(), 128, cudaMemcpyHostToDevice, stream), "copy");
    host[0] = 2;
    return out.download(stream)[0] == 1;
  });
}

TEST_CASE("planted: a stream of a capture is not joined") {
  expect_noticed("cudaErrorStreamCaptureUnjoined", [] {
    const Stream first;
    const Stream second;
    const Event fork(cudaEventDisableTiming);
    const DeviceArray<int> between(32);
    const DeviceArray<int> out(32);
    check(cudaStreamBeginCapture(first, cudaStreamCaptureModeGlobal), "begin");
    launch_fill(first, between.data(), 7);
    check(cudaEventRecord(fork, first), "fork");
    check(cudaStreamWaitEvent(second, fork, 0), "fork");
    launch_add(second, out.data(), between.data());
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(first, &graph), "end");
    return true;
  });
}

TEST_CASE("planted: allocation during a capture") {
  expect_noticed("cudaErrorStreamCaptureUnsupported", [] {
    const Stream stream;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin");
    const DeviceArray<int> out(32);
    return true;
  });
}

TEST_CASE("planted: synchronisation during a capture") {
  expect_noticed("cudaErrorStreamCaptureUnsupported", [] {
    const Stream stream;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin");
    stream.synchronize();
    return true;
  });
}

TEST_CASE("planted: captured copy to memory that is not pinned") {
  expect_noticed("not pinned", [] {
    const Stream stream;
    const DeviceArray<int> in(counting(32));
    std::vector<int> host(32);
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin");
    check(cudaMemcpyAsync(host.data(), in.data(), 128, cudaMemcpyDeviceToHost, stream), "copy");
    return true;
  });
}

TEST_CASE("planted: a stream is used after it was destroyed") {
  expect_noticed("cudaErrorInvalidResourceHandle", [] {
    const DeviceArray<int> out(32);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreate(&stream), "stream");
    check(cudaStreamDestroy(stream), "destroy");
    check(cudaMemsetAsync(out.data(), 0, 128, stream), "memset");
    return true;
  });
}

TEST_CASE("planted: a failure that only the destruction of the stream meets") {
  expect_noticed("__trap()", [] {
    const DeviceArray<int> out(32);
    const Stream stream;
    launch<trap>(one_block(32, stream), "trap", out.data());
    return true;
  });
}

}  // namespace
}  // namespace emulation
