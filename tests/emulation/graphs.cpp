// Capture of streams into graphs, and their launch.
#include <queue>
#include <utility>

#include "api_call.h"
#include "streams.h"

namespace emulation {
namespace {

std::vector<int> order_nodes(const std::vector<GraphNode>& nodes, bool latest_first) {
  std::vector<int> missing(nodes.size(), 0);
  std::vector<std::vector<int>> dependents(nodes.size());
  for (size_t i = 0; i < nodes.size(); ++i) {
    for (const int dependency : nodes[i].dependencies) {
      ++missing[i];
      dependents[static_cast<size_t>(dependency)].push_back(static_cast<int>(i));
    }
  }
  // The largest key first.
  const auto key = [&](int node) { return latest_first ? node : -node; };
  const auto after = [&](int a, int b) { return key(a) < key(b); };
  std::priority_queue<int, std::vector<int>, decltype(after)> ready(after);
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (missing[i] == 0) ready.push(static_cast<int>(i));
  }
  std::vector<int> order;
  while (!ready.empty()) {
    const int node = ready.top();
    ready.pop();
    order.push_back(node);
    for (const int dependent : dependents[static_cast<size_t>(node)]) {
      if (--missing[static_cast<size_t>(dependent)] == 0) ready.push(dependent);
    }
  }
  return order;
}

void run_plan(const GraphPlan& plan) {
  const std::vector<int>& order =
      config().streams == Streams::kLazy ? plan.latest_first : plan.earliest_first;
  for (size_t i = 0; i < order.size(); ++i) {
    const GraphNode* next =
        i + 1 < order.size() ? &plan.nodes[static_cast<size_t>(order[i + 1])] : nullptr;
    const bool follows =
        next != nullptr && next->dependencies.size() == 1 && next->dependencies[0] == order[i];
    run_work(plan.nodes[static_cast<size_t>(order[i])].work, follows ? &next->work : nullptr);
  }
}

// Whether all that the capture's streams hold is waited for by its origin.
bool is_joined(const Capture& capture) {
  std::vector<bool> reached(capture.nodes.size(), false);
  std::vector<int> open = capture.origin->tail;
  while (!open.empty()) {
    const auto node = static_cast<size_t>(open.back());
    open.pop_back();
    if (reached[node]) continue;
    reached[node] = true;
    const std::vector<int>& dependencies = capture.nodes[node].dependencies;
    open.insert(open.end(), dependencies.begin(), dependencies.end());
  }
  for (const CUstream_st* member : capture.members) {
    for (const int node : member->tail) {
      if (!reached[static_cast<size_t>(node)]) return false;
    }
  }
  return true;
}

}  // namespace

std::shared_ptr<const GraphPlan> plan_graph(const std::vector<GraphNode>& nodes) {
  return std::make_shared<const GraphPlan>(
      GraphPlan{nodes, order_nodes(nodes, true), order_nodes(nodes, false)});
}

}  // namespace emulation

using emulation::call_api;
using emulation::Capture;
using emulation::Need;
using emulation::registries;

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return call_api("cudaStreamBeginCapture", Need::kDevice, [&] {
    if (!emulation::is_stream(stream)) return cudaErrorInvalidResourceHandle;
    if (stream == nullptr) return cudaErrorStreamCaptureUnsupported;
    if (stream->capture != nullptr) return cudaErrorIllegalState;
    stream->capture = std::make_shared<Capture>();
    stream->capture->origin = stream;
    stream->capture->members = {stream};
    stream->capture->mode = mode;
    stream->capture->thread = std::this_thread::get_id();
    stream->tail.clear();
    return cudaSuccess;
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return call_api("cudaStreamIsCapturing", Need::kDevice, [&] {
    if (!emulation::is_stream(stream)) return cudaErrorInvalidResourceHandle;
    const bool captured = stream != nullptr && stream->capture != nullptr;
    *status = !captured                  ? cudaStreamCaptureStatusNone
              : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                         : cudaStreamCaptureStatusActive;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return call_api("cudaStreamEndCapture", Need::kDevice, [&] {
    if (!emulation::is_stream(stream)) return cudaErrorInvalidResourceHandle;
    if (stream == nullptr || stream->capture == nullptr) return cudaErrorIllegalState;
    const std::shared_ptr<Capture> capture = stream->capture;
    if (capture->origin != stream) return cudaErrorStreamCaptureUnmatched;
    if (capture->mode != cudaStreamCaptureModeRelaxed &&
        capture->thread != std::this_thread::get_id()) {
      return cudaErrorStreamCaptureWrongThread;
    }
    *graph = nullptr;
    const bool joined = emulation::is_joined(*capture);
    for (CUstream_st* member : capture->members) {
      member->capture = nullptr;
      member->tail.clear();
    }
    if (capture->invalid) return cudaErrorStreamCaptureInvalidated;
    if (!joined) return cudaErrorStreamCaptureUnjoined;
    *graph = registries().graphs.add(std::make_unique<CUgraph_st>());
    (*graph)->nodes = std::move(capture->nodes);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  return call_api("cudaGraphGetNodes", Need::kDevice, [&] {
    // Nodes are counted only; they have no handles.
    if (!registries().graphs.contains(graph) || nodes != nullptr) return cudaErrorInvalidValue;
    *count = graph->nodes.size();
    return cudaSuccess;
  });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  return call_api("cudaGraphInstantiate", Need::kDevice, [&] {
    if (!registries().graphs.contains(graph)) return cudaErrorInvalidValue;
    *executable = registries().executables.add(std::make_unique<CUgraphExec_st>());
    (*executable)->plan = emulation::plan_graph(graph->nodes);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream) {
  return call_api("cudaGraphUpload", Need::kDevice, [&] {
    const bool valid =
        registries().executables.contains(executable) && emulation::is_stream(stream);
    return valid ? cudaSuccess : cudaErrorInvalidValue;
  });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return call_api("cudaGraphLaunch", Need::kDevice, [&] {
    if (!registries().executables.contains(executable)) return cudaErrorInvalidValue;
    const auto plan = executable->plan;
    const bool captured = stream != nullptr && emulation::is_stream(stream) && stream->capture;
    const cudaError_t error =
        emulation::enqueue(stream, {nullptr, [plan] { emulation::run_plan(*plan); }});
    if (error != cudaSuccess || captured) return error;
    for (const emulation::GraphNode& node : plan->nodes) {
      if (node.event == nullptr) continue;
      node.event->recorded = true;
      node.event->queue = stream == nullptr ? nullptr : stream->queue;
      node.event->sequence = stream == nullptr ? 0 : stream->queue->issued;
    }
    return cudaSuccess;
  });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return call_api("cudaGraphExecDestroy", Need::kRelease, [&] {
    if (!registries().executables.contains(executable)) return cudaErrorInvalidValue;
    registries().executables.remove(executable);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return call_api("cudaGraphDestroy", Need::kRelease, [&] {
    if (!registries().graphs.contains(graph)) return cudaErrorInvalidValue;
    registries().graphs.remove(graph);
    return cudaSuccess;
  });
}
