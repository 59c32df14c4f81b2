// Measures the matrix products of the CPU backend against what the machine can do: read bandwidth
// and multiply-add peak, all in one run, interleaved, so that a noisy machine disturbs all alike.
//
//   bench_cpu [threads] [rounds] [rows]...
//   bench_cpu cores
//
// The second prints how long a cache line takes from one core to the other.
//
// One line per model and number of rows: the best time over all linears of a model (every layer has
// its own memory, so that nothing comes from a cache), with the head up to 60 rows. "share" is of
// the read bandwidth and of the peak; "x bound" is the time over the larger of the two floors.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <thread>
#include <vector>

#include "backend.h"
#include "check.h"
#include "cpu/cpu_backend.h"

namespace frspec::cpu {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct ModelShape {
  const char* name;
  int64_t layers, hidden, qkv, ffn, vocab;
};

constexpr ModelShape kModels[] = {{"SmolLM2-135M", 30, 576, 960, 1536, 49152},
                                  {"Qwen2.5-0.5B", 24, 896, 1152, 4864, 151936}};
const std::vector<int64_t> kDefaultRows = {1, 2, 3, 4, 6, 8, 12, 16, 32, 60, 512};
constexpr int64_t kMostHeadRows = 60;

struct Layer {
  LinearWeight qkv, o, gate, up, down;
};

struct Model {
  ModelShape shape;
  std::vector<Layer> layers;
  LinearWeight head;
};

// Multiply-adds of a product with bf16 weights whose operands stay in the L1 caches, by the
// backend's own kernel.
double peak_seconds(ThreadPool& pool, const Kernels& kernels, double& multiply_adds) {
  constexpr int64_t kDepth = 256;
  constexpr int64_t kRepeats = 20000;
  const int64_t rows = 12;
  std::vector<float> memory(static_cast<size_t>(pool.threads() * 65536), 0.0f);
  const Clock::time_point start = Clock::now();
  pool.parallel_for(kRepeats, 50, [&](int64_t begin, int64_t end, int thread) {
    float* own = memory.data() + thread * 65536;
    for (int64_t i = begin; i < end; ++i) {
      kernels.multiply[static_cast<int>(DType::kBF16)](
          {own, 0, 1, own + 16384, kDepth, rows, kDepth, own + 32768});
    }
  });
  multiply_adds = static_cast<double>(kRepeats * rows * kDepth * kernels.panel);
  return seconds_since(start);
}

struct Bench {
  Bench(int threads, const Kernels& chosen)
      : kernels(chosen), pool(threads), backend(threads, chosen) {}

  LinearWeight take_weight(Arena& arena, int64_t out, int64_t in) {
    return {arena.take("weights", backend.linear_bytes(DType::kBF16, out, in)), DType::kBF16, out,
            in, nullptr};
  }

  void layout(Arena& arena) {
    WorkspaceLimits limits;
    limits.rows = 512;
    limits.in_features = 4864;
    backend.layout(arena, limits);
    models.clear();
    for (const ModelShape& shape : kModels) {
      Model model{shape, {}, {}};
      for (int64_t l = 0; l < shape.layers; ++l) {
        model.layers.push_back({take_weight(arena, shape.qkv, shape.hidden),
                                take_weight(arena, shape.hidden, shape.hidden),
                                take_weight(arena, shape.ffn, shape.hidden),
                                take_weight(arena, shape.ffn, shape.hidden),
                                take_weight(arena, shape.hidden, shape.ffn)});
      }
      model.head = take_weight(arena, shape.vocab, shape.hidden);
      models.push_back(model);
    }
    x = arena.take_tensor("activations", DType::kF32, 512, 4864);
    y = arena.take_tensor("activations", DType::kF32, 512, 4864);
    logits = arena.take_tensor("activations", DType::kF32, kMostHeadRows, 151936);
  }

  static Tensor view(const Tensor& t, int64_t rows, int64_t cols) {
    return {t.data, t.dtype, rows, cols, cols};
  }

  double run(const Model& model, int64_t n) {
    const ModelShape& s = model.shape;
    const Clock::time_point start = Clock::now();
    for (const Layer& layer : model.layers) {
      const Tensor in = view(x, n, s.hidden);
      backend.linear(view(y, n, s.qkv), in, layer.qkv, Rows::kTarget, nullptr);
      backend.linear(view(y, n, s.hidden), in, layer.o, Rows::kTarget, &in);
      backend.linear_swiglu(view(y, n, s.ffn), in, layer.gate, layer.up, Rows::kTarget);
      backend.linear(view(y, n, s.hidden), view(x, n, s.ffn), layer.down, Rows::kTarget, &in);
    }
    if (n <= kMostHeadRows) {
      backend.linear(view(logits, n, s.vocab), view(x, n, s.hidden), model.head, Rows::kTarget,
                     nullptr);
    }
    return seconds_since(start);
  }

  static double weights(const Model& model, int64_t n) {
    const ModelShape& s = model.shape;
    const double layer = static_cast<double>(s.hidden * (s.qkv + s.hidden + 3 * s.ffn));
    return static_cast<double>(s.layers) * layer +
           (n <= kMostHeadRows ? static_cast<double>(s.vocab * s.hidden) : 0.0);
  }

  const Kernels& kernels;
  ThreadPool pool;
  CpuBackend backend;
  std::vector<Model> models;
  Tensor x, y, logits;
};

void fill(const Tensor& t, uint32_t seed) {
  std::minstd_rand engine(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t c = 0; c < t.cols; ++c) t.row<float>(r)[c] = uniform(engine);
  }
}

int run_bench(int threads, int rounds, const std::vector<int64_t>& all_rows) {
  if (threads == 0) threads = usable_threads();
  Bench bench(threads, choose_kernels());
  Arena plan;
  bench.layout(plan);
  void* memory = bench.backend.allocate(plan.used_bytes());
  Arena arena(memory, plan.used_bytes());
  bench.layout(arena);
  fill(bench.x, 1);

  double bandwidth = 0;
  double peak = 1e9;
  double peak_operations = 1;
  std::vector<std::vector<double>> best(2, std::vector<double>(all_rows.size(), 1e9));
  for (int round = 0; round < rounds; ++round) {
    for (size_t m = 0; m < bench.models.size(); ++m) {
      for (size_t i = 0; i < all_rows.size(); ++i) {
        if (all_rows[i] > kMostHeadRows && round % 3 != 0) continue;
        bandwidth = std::max(bandwidth, bench.backend.measure_bandwidth());
        peak = std::min(peak, peak_seconds(bench.pool, bench.kernels, peak_operations));
        best[m][i] = std::min(best[m][i], bench.run(bench.models[m], all_rows[i]));
      }
    }
  }
  const double rate = peak_operations / peak;
  std::printf("%s\nread bandwidth %.1f GB/s, peak %.1f GMAC/s, best of %d rounds\n\n",
              bench.backend.info().description.c_str(), bandwidth * 1e-9, rate * 1e-9, rounds);
  std::printf("%-14s %5s %9s %8s %7s %8s %7s %8s %10s\n", "model", "rows", "ms", "GB/s", "share",
              "GMAC/s", "share", "x row 1", "x bound");
  for (size_t m = 0; m < bench.models.size(); ++m) {
    for (size_t i = 0; i < all_rows.size(); ++i) {
      const double count = Bench::weights(bench.models[m], all_rows[i]);
      const double bytes = 2 * count / best[m][i];
      const double products = static_cast<double>(all_rows[i]) * count / best[m][i];
      const double bound =
          std::max(2 * count / bandwidth, static_cast<double>(all_rows[i]) * count / rate);
      std::printf("%-14s %5lld %9.2f %8.1f %6.0f%% %8.1f %6.0f%% %8.2f %10.2f\n",
                  bench.models[m].shape.name, static_cast<long long>(all_rows[i]), 1e3 * best[m][i],
                  bytes * 1e-9, 100 * bytes / bandwidth, products * 1e-9, 100 * products / rate,
                  best[m][i] / best[m][0], best[m][i] / bound);
    }
  }
  return 0;
}

// Two threads hand a number to and fro; the best of three.
double handover_seconds() {
  constexpr int kHandovers = 20000;
  double best = 1e9;
  for (int round = 0; round < 3; ++round) {
    alignas(64) std::atomic<int> ball{0};
    const auto play = [&ball](int first) {
      for (int i = first; i < kHandovers; i += 2) {
        while (ball.load(std::memory_order_acquire) != i) {
        }
        ball.store(i + 1, std::memory_order_release);
      }
    };
    const Clock::time_point start = Clock::now();
    std::thread other(play, 1);
    play(0);
    other.join();
    best = std::min(best, seconds_since(start) / kHandovers);
  }
  return best;
}

}  // namespace
}  // namespace frspec::cpu

int main(int argc, char** argv) {
  try {
    if (argc == 2 && std::strcmp(argv[1], "cores") == 0) {
      std::printf("from core to core %.0f ns\n", 1e9 * frspec::cpu::handover_seconds());
      return 0;
    }
    const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
    const int rounds = argc > 2 ? std::atoi(argv[2]) : 9;
    std::vector<int64_t> rows;
    for (int i = 3; i < argc; ++i) rows.push_back(std::clamp<int64_t>(std::atoll(argv[i]), 1, 512));
    return frspec::cpu::run_bench(threads, rounds, rows.empty() ? frspec::cpu::kDefaultRows : rows);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_cpu: %s\n", error.what());
    return 2;
  }
}
