// Streams, events, captures and graphs. Internal to the emulation; all under api_mutex().
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "kernel_launch.h"

namespace emulation {

// One of the two.
struct Work {
  std::shared_ptr<const KernelCall> kernel;
  std::function<void()> function;
};

struct StreamQueue;

struct Operation {
  Work work;
  std::shared_ptr<StreamQueue> wait_for;  // done up to wait_until first
  uint64_t wait_until = 0;
};

// Outlives its stream while something waits for it.
struct StreamQueue {
  std::deque<Operation> operations;
  uint64_t issued = 0;
  uint64_t done = 0;
  bool running = false;
};

struct EventState {
  bool timing = true;
  bool recorded = false;
  std::shared_ptr<StreamQueue> queue;  // null: done
  uint64_t sequence = 0;
  std::chrono::steady_clock::time_point stamp;
};

struct GraphNode {
  Work work;
  std::vector<int> dependencies;
  std::shared_ptr<EventState> event;  // that the node records
};

struct Capture {
  std::vector<GraphNode> nodes;
  CUstream_st* origin = nullptr;
  std::vector<CUstream_st*> members;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread;
  bool invalid = false;
};

// What a launch runs. Shared, so that a graph may be destroyed while a launch of it is queued.
struct GraphPlan {
  std::vector<GraphNode> nodes;
  // Orders that the dependencies allow: the latest captured node that is ready first, or the
  // earliest.
  std::vector<int> latest_first;
  std::vector<int> earliest_first;
};

// The objects behind handles, in the order of their creation. What is not among them is refused.
template <typename T>
class Registry {
 public:
  T* add(std::unique_ptr<T> object) {
    objects_.push_back(std::move(object));
    return objects_.back().get();
  }
  bool contains(const T* handle) const {
    for (const auto& object : objects_) {
      if (object.get() == handle) return true;
    }
    return false;
  }
  void remove(const T* handle) {
    std::erase_if(objects_, [&](const auto& object) { return object.get() == handle; });
  }
  void clear() { objects_.clear(); }
  const std::vector<std::unique_ptr<T>>& all() const { return objects_; }

 private:
  std::vector<std::unique_ptr<T>> objects_;
};

struct Registries {
  Registry<CUstream_st> streams;
  Registry<CUevent_st> events;
  Registry<CUgraph_st> graphs;
  Registry<CUgraphExec_st> executables;
};
Registries& registries();

// Null is the legacy default stream.
bool is_stream(cudaStream_t stream);

// Puts the work into the stream, or into the graph that the stream is captured in. `event`: that
// the work records.
cudaError_t enqueue(cudaStream_t stream, Work work, std::shared_ptr<EventState> event = nullptr);
void run_until(const std::shared_ptr<StreamQueue>& queue, uint64_t sequence);
// All streams, or those that the default stream waits for.
void run_streams(bool all);
void run_work(const Work& work, const Work* follower);

// For calls that are not allowed while a stream is captured: makes such captures invalid.
cudaError_t check_no_capture();

void drop_queued_work();
void forget_streams();

// ---- graphs.cpp

std::shared_ptr<const GraphPlan> plan_graph(const std::vector<GraphNode>& nodes);

}  // namespace emulation

struct CUstream_st {
  std::shared_ptr<emulation::StreamQueue> queue = std::make_shared<emulation::StreamQueue>();
  bool blocking = true;
  std::shared_ptr<emulation::Capture> capture;
  std::vector<int> tail;  // nodes that the next one depends on
};

struct CUevent_st {
  std::shared_ptr<emulation::EventState> state = std::make_shared<emulation::EventState>();
  // Recorded while captured: stands for these nodes.
  std::shared_ptr<emulation::Capture> capture;
  std::vector<int> nodes;
};

struct CUgraph_st {
  std::vector<emulation::GraphNode> nodes;
};

struct CUgraphExec_st {
  std::shared_ptr<const emulation::GraphPlan> plan;
};
