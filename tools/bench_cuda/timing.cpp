#include <algorithm>
#include <memory>

#include "bench.h"
#include "handles.h"

namespace frspec::cuda::bench {

namespace {

class TimedGraph {
 public:
  TimedGraph(cudaStream_t stream, const std::function<void()>& body)
      : stream_(stream), graph_(stream, [&] {
          record(start_);
          body();
          record(end_);
        }) {}

  double run() {
    graph_.launch(stream_);
    check(cudaStreamSynchronize(stream_), "waiting for a graph");
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, start_, end_), "reading time stamps");
    return static_cast<double>(milliseconds) * 1e-3;
  }

 private:
  void record(const Event& event) const {
    check(cudaEventRecordWithFlags(event, stream_, cudaEventRecordExternal), "recording");
  }

  cudaStream_t stream_;
  Event start_;
  Event end_;
  Graph graph_;
};

}  // namespace

Sample sample_backend(Backend& backend, std::function<void()> body) {
  // A backend keeps what it has recorded by its key, so that every sample needs its own.
  static int32_t samples = 0;
  const WorkKey key{WorkKey::kPlainRound, samples++, 0};
  return [&backend, key, body = std::move(body)] {
    backend.run(key, [&] {
      backend.mark(0);
      body();
      backend.mark(1);
    });
    backend.synchronize();
    return backend.seconds_between(0, 1);
  };
}

Sample sample_stream(cudaStream_t stream, const std::function<void()>& body) {
  body();  // what a library sets up at its first call cannot be recorded
  check(cudaStreamSynchronize(stream), "warming up");
  const auto graph = std::make_shared<TimedGraph>(stream, body);
  return [graph] { return graph->run(); };
}

double median(std::vector<double> values) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

std::vector<double> medians(const std::vector<Sample>& samples, int repeats) {
  std::vector<std::vector<double>> seconds(samples.size());
  for (int turn = 0; turn <= repeats; ++turn) {
    for (size_t i = 0; i < samples.size(); ++i) {
      const double taken = samples[i]();
      if (turn > 0) seconds[i].push_back(taken);
    }
  }
  std::vector<double> result;
  for (const auto& each : seconds) result.push_back(median(each));
  return result;
}

}  // namespace frspec::cuda::bench
