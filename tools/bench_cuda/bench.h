// What the parts of bench_cuda share: settings, timing, and the rows they report.
//
// A row is a JSON object with "us", the median time of one op in microseconds, and "bytes", the
// bytes that the op has to read; main.cpp sets them in relation to the bandwidth of the same run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "backend.h"
#include "config.h"

namespace frspec::cuda::bench {

using nlohmann::json;

struct Settings {
  std::string model;    // folder; only its config is read, but by the memory part
  std::string drafter;  // folder, likewise
  std::string ranking;  // file, for the memory part
  int device = 0;
  int repeats = 15;
  int64_t rotated_bytes = 0;  // of copies of a matrix that take turns; 0: by the L2 cache
  int64_t sub_vocab = 32768;
  TreeShape tree;
  std::vector<int64_t> rows{1, 8, 16, 32, 60, 64};
  std::vector<int64_t> contexts{512, 2048, 8192};
};

struct Bench {
  Settings settings;
  ModelConfig target;
  ModelConfig drafter;
  int multiprocessors = 0;
  std::vector<double> bandwidths;  // bytes per second, measured between the parts' ops

  std::unique_ptr<Backend> make_backend() const;
  // How many copies of `bytes` do not come from the L2 cache when they take turns.
  int64_t copies(size_t bytes) const;
  // The sizes that the backend's scratch memory is planned for.
  WorkspaceLimits limits(int64_t rows, int64_t visible) const;
};

// Each part returns rows; its own fields say what of.
json measure_linears(Bench& bench);
json measure_attention(Bench& bench);
json measure_drafting(Bench& bench);
json measure_upload(const Bench& bench);  // one object, GB/s
json measure_memory(const Bench& bench);  // one object, bytes

// Runs something once; seconds on the device.
using Sample = std::function<double()>;

// A graph of the ops that `body` calls, between two time stamps; recorded at the first run.
Sample sample_backend(Backend& backend, std::function<void()> body);
// The same of what `body` puts on the stream, done once and recorded at once. The stream must
// outlive the sample.
Sample sample_stream(cudaStream_t stream, const std::function<void()>& body);

// Median seconds of each sample. They take turns, and the first turn is not counted.
std::vector<double> medians(const std::vector<Sample>& samples, int repeats);

double median(std::vector<double> values);

// Fills dense rows with random elements.
void fill_random(Backend& backend, const Tensor& t, uint64_t seed);

inline Tensor view(const Tensor& t, int64_t rows, int64_t cols) {
  return {t.data, t.dtype, rows, cols, cols};
}

}  // namespace frspec::cuda::bench
