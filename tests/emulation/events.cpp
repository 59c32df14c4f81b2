// Events: points in a stream that can be waited for, and their times.
#include <chrono>
#include <utility>

#include "api_call.h"
#include "streams.h"

using emulation::call_api;
using emulation::EventState;
using emulation::Need;
using emulation::registries;

namespace {

cudaError_t create_event(const char* name, cudaEvent_t* event, unsigned flags) {
  return call_api(name, Need::kDevice, [&] {
    if (event == nullptr) return cudaErrorInvalidValue;
    *event = registries().events.add(std::make_unique<CUevent_st>());
    (*event)->state->timing = (flags & cudaEventDisableTiming) == 0;
    return cudaSuccess;
  });
}

emulation::Work stamp_time(const std::shared_ptr<EventState>& state) {
  return {nullptr, [state] { state->stamp = std::chrono::steady_clock::now(); }};
}

cudaError_t record_event(const char* name, cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return call_api(name, Need::kDevice, [&] {
    if (!registries().events.contains(event) || !emulation::is_stream(stream)) {
      return cudaErrorInvalidResourceHandle;
    }
    if (flags != cudaEventRecordDefault && flags != cudaEventRecordExternal) {
      return cudaErrorInvalidValue;
    }
    const std::shared_ptr<EventState>& state = event->state;
    if (stream != nullptr && stream->capture != nullptr) {
      // An external record is a node, which records the event whenever the graph is launched.
      if (flags == cudaEventRecordExternal) {
        return emulation::enqueue(stream, stamp_time(state), state);
      }
      event->capture = stream->capture;
      event->nodes = stream->tail;
      return cudaSuccess;
    }
    if (flags == cudaEventRecordExternal) return cudaErrorInvalidValue;  // of captures alone
    event->capture = nullptr;
    event->nodes.clear();
    if (state->timing || stream == nullptr) {
      const cudaError_t error = emulation::enqueue(stream, stamp_time(state));
      if (error != cudaSuccess) return error;
    }
    state->recorded = true;
    state->queue = stream == nullptr ? nullptr : stream->queue;
    state->sequence = stream == nullptr ? 0 : stream->queue->issued;
    return cudaSuccess;
  });
}

bool is_done(const EventState& state) {
  return state.queue == nullptr || state.queue->done >= state.sequence;
}

}  // namespace

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return create_event("cudaEventCreate", event, cudaEventDefault);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return create_event("cudaEventCreateWithFlags", event, flags);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return call_api("cudaEventDestroy", Need::kRelease, [&] {
    if (!registries().events.contains(event)) return cudaErrorInvalidResourceHandle;
    registries().events.remove(event);
    return cudaSuccess;
  });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return record_event("cudaEventRecord", event, stream, cudaEventRecordDefault);
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return record_event("cudaEventRecordWithFlags", event, stream, flags);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return call_api("cudaEventSynchronize", Need::kDevice, [&] {
    if (!registries().events.contains(event)) return cudaErrorInvalidResourceHandle;
    if (event->capture != nullptr) return cudaErrorCapturedEvent;
    // A copy: a failure in the stream may end in another state of the event.
    const EventState state = *event->state;
    if (state.queue != nullptr) emulation::run_until(state.queue, state.sequence);
    return cudaSuccess;
  });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return call_api("cudaEventQuery", Need::kDevice, [&] {
    if (!registries().events.contains(event)) return cudaErrorInvalidResourceHandle;
    if (event->capture != nullptr) return cudaErrorCapturedEvent;
    const EventState state = *event->state;
    if (is_done(state)) return cudaSuccess;
    emulation::run_until(state.queue, state.queue->done + 1);
    return cudaErrorNotReady;
  });
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  return call_api("cudaEventElapsedTime", Need::kDevice, [&] {
    if (milliseconds == nullptr) return cudaErrorInvalidValue;
    for (const cudaEvent_t event : {start, end}) {
      if (!registries().events.contains(event)) return cudaErrorInvalidResourceHandle;
      if (event->capture != nullptr) return cudaErrorCapturedEvent;
      if (!event->state->timing || !event->state->recorded) return cudaErrorInvalidResourceHandle;
    }
    for (const cudaEvent_t event : {start, end}) {
      if (!is_done(*event->state)) return cudaErrorNotReady;
    }
    *milliseconds =
        std::chrono::duration<float, std::milli>(end->state->stamp - start->state->stamp).count();
    return cudaSuccess;
  });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return call_api("cudaStreamWaitEvent", Need::kDevice, [&] {
    if (!registries().events.contains(event) || !emulation::is_stream(stream)) {
      return cudaErrorInvalidResourceHandle;
    }
    if (event->capture != nullptr) {
      if (stream == nullptr) return cudaErrorStreamCaptureImplicit;
      if (stream->capture == nullptr) {  // joins the capture
        stream->capture = event->capture;
        stream->capture->members.push_back(stream);
        stream->tail.clear();
      } else if (stream->capture != event->capture) {
        return cudaErrorStreamCaptureIsolation;
      }
      stream->tail.insert(stream->tail.end(), event->nodes.begin(), event->nodes.end());
      return cudaSuccess;
    }
    const EventState& state = *event->state;
    if (stream != nullptr && stream->capture != nullptr) {
      if (state.queue == nullptr) return cudaSuccess;
      stream->capture->invalid = true;
      return cudaErrorStreamCaptureIsolation;
    }
    if (is_done(state)) return cudaSuccess;
    if (stream == nullptr) {
      emulation::run_until(state.queue, state.sequence);
    } else if (state.queue != stream->queue) {
      stream->queue->operations.push_back({{}, state.queue, state.sequence});
      ++stream->queue->issued;
    }
    return cudaSuccess;
  });
}
