// What the emulation's tests share: RAII for the objects of the runtime, and bugs in child
// processes.
#pragma once

#include <doctest/doctest.h>

#include <functional>
#include <string>
#include <vector>

#include "handles.h"
#include "launch.h"
#include "ptx.cuh"
#include "sanitizers.h"

namespace emulation {

using frspec::cuda::check;
using frspec::cuda::Event;
using frspec::cuda::launch;
using frspec::cuda::LaunchConfig;

// Restores the configuration and resets the device.
class FreshDevice {
 public:
  FreshDevice() { reset_device(); }
  ~FreshDevice() {
    config() = saved_;
    reset_device();
  }
  FreshDevice(const FreshDevice&) = delete;
  FreshDevice& operator=(const FreshDevice&) = delete;

 private:
  Config saved_ = config();
};

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"); }
  // May throw the failure of what is still queued.
  ~Stream() noexcept(false) { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }
  void synchronize() const { check(cudaStreamSynchronize(stream_), "synchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    check(cudaMalloc(&data_, count * sizeof(T)), "allocate");
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "upload");
  }
  ~DeviceArray() noexcept(false) { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  // After all that is in the stream.
  std::vector<T> download(const Stream& stream) const {
    std::vector<T> values(count_);
    check(cudaMemcpyAsync(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost, stream),
          "download");
    stream.synchronize();
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

template <typename T>
class PinnedArray {
 public:
  explicit PinnedArray(size_t count) {
    check(cudaHostAlloc(&data_, count * sizeof(T), cudaHostAllocDefault), "allocate pinned");
  }
  ~PinnedArray() noexcept(false) { cudaFreeHost(data_); }
  PinnedArray(const PinnedArray&) = delete;
  PinnedArray& operator=(const PinnedArray&) = delete;
  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

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
  void replay(const Stream& stream) const { check(cudaGraphLaunch(executable_, stream), "launch"); }
  size_t nodes() const {
    size_t count = 0;
    check(cudaGraphGetNodes(graph_, nullptr, &count), "nodes");
    return count;
  }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

inline LaunchConfig one_block(unsigned threads, const Stream& stream, size_t shared_bytes = 0) {
  return {.grid = dim3(1), .block = dim3(threads), .stream = stream, .shared_bytes = shared_bytes};
}

// first, first + 1, ...
inline std::vector<int> counting(int count, int first = 0) {
  std::vector<int> values;
  for (int i = 0; i < count; ++i) values.push_back(first + i);
  return values;
}

struct Outcome {
  int status;  // 0: ended as if nothing was wrong
  std::string output;
};
// In a forked process, under the default configuration except for the order of threads. The body
// returns whether its results are right.
Outcome run_in_child(const std::function<bool()>& body);

// The bug must be noticed: by a wrong result, an Error, a sanitizer or a crash. `how` is part of
// what is said about it; kWrongResult stands for the body's own verdict.
void expect_noticed(const std::string& how, const std::function<bool()>& body);
inline const std::string kWrongResult = "wrong result";
// The same, for what only a build with the sanitizer can notice.
void expect_noticed_by_asan(const std::string& how, const std::function<bool()>& body);

// Whether run() is right with forward and with reverse order of threads.
template <typename Run>
bool right_in_both_orders(const Run& run) {
  bool right = true;
  for (const Order order : {Order::kForward, Order::kReverse}) {
    config().order = order;
    right = run() && right;
  }
  return right;
}

// Races show by a wrong result in one of two orders, or are seen by ThreadSanitizer.
inline const std::string kRace = kThreadSanitizer ? "data race" : kWrongResult;

// Whether element i of out is expected(i), after one launch of a block.
template <auto Kernel, typename Expected, typename... Args>
bool gives(unsigned threads, const Expected& expected, Args... args) {
  const Stream stream;
  const DeviceArray<int> out(threads);
  launch<Kernel>(one_block(threads, stream), "planted", out.data(), args...);
  const std::vector<int> found = out.download(stream);
  for (unsigned i = 0; i < threads; ++i) {
    if (found[i] != expected(static_cast<int>(i))) return false;
  }
  return true;
}

// One launch of a block, whose results do not matter.
template <auto Kernel, typename... Args>
bool ends(unsigned threads, Args... args) {
  const Stream stream;
  const DeviceArray<int> out(threads);
  launch<Kernel>(one_block(threads, stream), "planted", out.data(), args...);
  stream.synchronize();
  return true;
}

}  // namespace emulation
