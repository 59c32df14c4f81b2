// How fast weights come to the device, and how the memory plan compares with what is taken.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "bench.h"
#include "cpu/convert.h"
#include "engine.h"
#include "handles.h"
#include "memory.h"

namespace frspec::cuda::bench {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int64_t kUploadCols = 4096;
constexpr int kUploadTurns = 5;

double seconds_of(const std::function<void()>& work) {
  const Clock::time_point start = Clock::now();
  work();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

size_t free_bytes() {
  size_t free = 0;
  size_t total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for free memory");
  return free;
}

void generate(Engine& engine, Method method) {
  Request request;
  request.method = method;
  request.max_new_tokens = 16;
  request.ignore_eos = true;
  std::vector<int32_t> prompt;
  for (int64_t i = 0; i < engine.max_context() / 2; ++i) {
    prompt.push_back(static_cast<int32_t>((i * 7919 + 101) % engine.config().vocab_size));
  }
  engine.start(prompt, request);
  while (!engine.finished()) engine.step();
}

}  // namespace

// One matrix of settings.rotated_bytes in bf16, from memory that the system may page (a mapped file
// that is in its cache), beside one copy out of pinned memory.
json measure_upload(const Bench& bench) {
  const int64_t rows = std::max<int64_t>(1, bench.settings.rotated_bytes / 2 / kUploadCols);
  const std::unique_ptr<Backend> backend = bench.make_backend();
  const size_t bytes = backend->linear_bytes(DType::kBF16, rows, kUploadCols);
  const LinearWeight weight{backend->allocate(bytes), DType::kBF16, rows, kUploadCols, nullptr};
  std::vector<float> fp32(static_cast<size_t>(rows * kUploadCols));
  for (size_t i = 0; i < fp32.size(); ++i) fp32[i] = static_cast<float>(i % 251) * 0.01f;
  std::vector<uint16_t> bf16(fp32.size());
  cpu::convert(bf16.data(), DType::kBF16, fp32.data(), DType::kF32,
               static_cast<int64_t>(fp32.size()));
  const PinnedMemory pinned(bytes);
  std::memcpy(pinned.data(), bf16.data(), bytes);

  const auto load = [&](void* source, DType dtype) {
    backend->load_linear(weight, 0, {source, dtype, rows, kUploadCols, kUploadCols});
    backend->synchronize();
  };
  const auto copy = [&] {
    backend->upload(weight.data, pinned.data(), bytes);
    backend->synchronize();
  };
  const std::vector<double> seconds =
      medians({[&] { return seconds_of([&] { load(bf16.data(), DType::kBF16); }); },
               [&] { return seconds_of([&] { load(fp32.data(), DType::kF32); }); },
               [&] { return seconds_of(copy); }},
              kUploadTurns);
  const auto rate = [&](size_t i) { return static_cast<double>(bytes) * 1e-9 / seconds[i]; };
  return {{"bytes", bytes},
          {"loader_gb_per_s", rate(0)},
          {"loader_from_fp32_gb_per_s", rate(1)},
          {"pinned_copy_gb_per_s", rate(2)}};
}

json measure_memory(const Bench& bench) {
  EngineOptions options;
  options.model = bench.settings.model;
  options.drafter = bench.settings.drafter;
  options.ranking = bench.settings.ranking;
  options.draft_vocab_size = std::min(bench.settings.sub_vocab, bench.target.vocab_size);
  options.device = concat("cuda:", bench.settings.device);
  options.max_context = std::min<int64_t>(1024, bench.target.max_position_embeddings);
  options.tree = bench.settings.tree;
  Engine engine(options);
  const size_t before = free_bytes();  // the context is there; kernels and graphs come later
  const Clock::time_point start = Clock::now();
  engine.load();
  const double load_seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const size_t loaded = before - free_bytes();
  for (const Method method : {Method::kPlain, Method::kEagle2}) generate(engine, method);
  return {{"planned_bytes", engine.plan().total_bytes()},
          {"load_s", load_seconds},
          {"taken_by_load_bytes", loaded},
          {"taken_after_generation_bytes", before - free_bytes()}};
}

}  // namespace frspec::cuda::bench
