// Streams: what is queued, and when it is done.
//
// By default streams are lazy: work is done as late as the program's synchronisation allows, so a
// missing wait shows.
#include "streams.h"

#include <algorithm>
#include <utility>

#include "api_call.h"
#include "device_memory.h"
#include "thread_block.h"

namespace emulation {
namespace {

// The kernel behind the one that runs now, if it runs in this call too.
const Work* follower(const StreamQueue& queue, uint64_t sequence) {
  const bool next_runs = queue.done + 2 <= sequence && !queue.operations.empty();
  return next_runs ? &queue.operations.front().work : nullptr;
}

}  // namespace

Registries& registries() {
  // Never destroyed: destructors of static objects may still call.
  static auto* const all = new Registries;
  return *all;
}

bool is_stream(cudaStream_t stream) {
  return stream == nullptr || registries().streams.contains(stream);
}

void run_work(const Work& work, const Work* follower) {
  if (work.kernel == nullptr) {
    if (work.function) work.function();
    return;
  }
  const bool overlap =
      follower != nullptr && config().overlap_kernels && config().streams == Streams::kLazy;
  run_kernel(*work.kernel, overlap ? follower->kernel.get() : nullptr);
}

void run_until(const std::shared_ptr<StreamQueue>& queue, uint64_t sequence) {
  if (queue->done >= sequence) return;
  const DeviceScope scope;
  while (queue->done < sequence) {
    if (queue->running) throw Error("a stream waits for itself");
    const Operation operation = std::move(queue->operations.front());
    queue->operations.pop_front();
    queue->running = true;
    try {
      if (operation.wait_for != nullptr) run_until(operation.wait_for, operation.wait_until);
      run_work(operation.work, follower(*queue, sequence));
    } catch (...) {
      // What was queued behind a failure is dropped.
      queue->running = false;
      queue->operations.clear();
      queue->done = queue->issued;
      throw;
    }
    queue->running = false;
    ++queue->done;
  }
}

void run_streams(bool all) {
  for (const auto& stream : registries().streams.all()) {
    if (all || stream->blocking) run_until(stream->queue, stream->queue->issued);
  }
}

cudaError_t enqueue(cudaStream_t stream, Work work, std::shared_ptr<EventState> event) {
  if (!is_stream(stream)) return cudaErrorInvalidResourceHandle;
  if (stream == nullptr) {
    for (const auto& other : registries().streams.all()) {
      if (!other->blocking || other->capture == nullptr) continue;
      other->capture->invalid = true;
      return cudaErrorStreamCaptureImplicit;
    }
    run_streams(false);
    const DeviceScope scope;
    run_work(work, nullptr);
    return cudaSuccess;
  }
  if (stream->capture != nullptr) {
    Capture& capture = *stream->capture;
    if (capture.invalid) return cudaErrorStreamCaptureInvalidated;
    capture.nodes.push_back({std::move(work), std::move(stream->tail), std::move(event)});
    stream->tail = {static_cast<int>(capture.nodes.size()) - 1};
    return cudaSuccess;
  }
  stream->queue->operations.push_back({std::move(work), nullptr, 0});
  ++stream->queue->issued;
  if (config().streams == Streams::kImmediate) run_until(stream->queue, stream->queue->issued);
  return cudaSuccess;
}

cudaError_t check_no_capture() {
  cudaError_t error = cudaSuccess;
  for (const auto& stream : registries().streams.all()) {
    const auto& capture = stream->capture;
    if (capture == nullptr || capture->mode == cudaStreamCaptureModeRelaxed) continue;
    if (capture->mode == cudaStreamCaptureModeThreadLocal &&
        capture->thread != std::this_thread::get_id()) {
      continue;
    }
    capture->invalid = true;
    error = cudaErrorStreamCaptureUnsupported;
  }
  return error;
}

void drop_queued_work() {
  for (const auto& stream : registries().streams.all()) {
    stream->queue->operations.clear();
    stream->queue->done = stream->queue->issued;
  }
}

void forget_streams() {
  for (const auto& stream : registries().streams.all()) stream->capture = nullptr;
  registries() = {};
}

cudaError_t enqueue_kernel(KernelCall call, cudaStream_t stream) {
  return call_api("cudaLaunchKernelEx", Need::kDevice, [&] {
    const cudaError_t error = check_launch(call);
    if (error != cudaSuccess) return error;
    call.check_arguments(call.name, call.arguments.get());
    return enqueue(stream, {std::make_shared<const KernelCall>(std::move(call)), nullptr});
  });
}

}  // namespace emulation

using emulation::call_api;
using emulation::Need;
using emulation::registries;

static cudaError_t create_stream(const char* name, cudaStream_t* stream, unsigned flags) {
  return call_api(name, Need::kDevice, [&] {
    if (stream == nullptr || (flags & ~unsigned{cudaStreamNonBlocking}) != 0) {
      return cudaErrorInvalidValue;
    }
    *stream = registries().streams.add(std::make_unique<CUstream_st>());
    (*stream)->blocking = flags != cudaStreamNonBlocking;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return create_stream("cudaStreamCreateWithFlags", stream, flags);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return create_stream("cudaStreamCreateWithPriority", stream, flags);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return create_stream("cudaStreamCreate", stream, cudaStreamDefault);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return call_api("cudaStreamDestroy", Need::kRelease, [&] {
    if (stream == nullptr || !emulation::is_stream(stream)) return cudaErrorInvalidResourceHandle;
    if (stream->capture != nullptr) {
      stream->capture->invalid = true;
      std::erase(stream->capture->members, stream);
    }
    // Gone even if its work fails.
    const std::shared_ptr<emulation::StreamQueue> queue = stream->queue;
    registries().streams.remove(stream);
    emulation::run_until(queue, queue->issued);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return call_api("cudaStreamSynchronize", Need::kDevice, [&] {
    if (!emulation::is_stream(stream)) return cudaErrorInvalidResourceHandle;
    if (stream == nullptr) {
      emulation::run_streams(false);
      return cudaSuccess;
    }
    if (stream->capture != nullptr) {
      stream->capture->invalid = true;
      return cudaErrorStreamCaptureUnsupported;
    }
    emulation::run_until(stream->queue, stream->queue->issued);
    return cudaSuccess;
  });
}

// Each query lets one more piece of work be done, so that loops of queries end.
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return call_api("cudaStreamQuery", Need::kDevice, [&] {
    if (stream == nullptr || !emulation::is_stream(stream)) return cudaErrorInvalidResourceHandle;
    if (stream->capture != nullptr) {
      stream->capture->invalid = true;
      return cudaErrorStreamCaptureUnsupported;
    }
    if (stream->queue->done == stream->queue->issued) return cudaSuccess;
    emulation::run_until(stream->queue, stream->queue->done + 1);
    return cudaErrorNotReady;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return call_api("cudaDeviceSynchronize", Need::kDevice, [] {
    const cudaError_t error = emulation::check_no_capture();
    if (error == cudaSuccess) emulation::run_streams(true);
    return error;
  });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return call_api("cudaLaunchHostFunc", Need::kDevice, [&] {
    return emulation::enqueue(stream, {nullptr, [=] { function(data); }});
  });
}
