// bench_cuda: the parts of decoding on a GPU, each against the floor of what it has to read and,
// for the products, against cuBLAS. Weights are random and of the shapes of a model's config.json;
// copies of a matrix take turns, so that they come from device memory and not from the L2 cache.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <fstream>

#include "bench.h"
#include "cuda_backend.h"
#include "llama.h"

namespace frspec::cuda::bench {

namespace {
constexpr int64_t kMostCopies = 256;
constexpr int64_t kLeastRotatedBytes = 256 << 20;
constexpr int64_t kRotatedL2Caches = 8;
const std::vector<std::string> kParts = {"linears", "attention", "drafting", "upload", "memory"};
}  // namespace

std::unique_ptr<Backend> Bench::make_backend() const {
  return std::make_unique<CudaBackend>(settings.device);
}

int64_t Bench::copies(size_t bytes) const {
  const auto each = static_cast<int64_t>(bytes);
  return std::clamp<int64_t>((settings.rotated_bytes + each - 1) / each, 2, kMostCopies);
}

WorkspaceLimits Bench::limits(int64_t rows, int64_t visible) const {
  WorkspaceLimits limits;
  limits.rows = std::max<int64_t>(rows, settings.tree.topk);
  limits.round_rows = limits.rows;
  limits.choice_rows = 1;
  limits.beam_rows = settings.tree.topk;
  limits.vocab = target.vocab_size;
  limits.visible = visible;
  raise_limits(limits, target);
  raise_limits(limits, drafter);
  return limits;
}

void fill_random(Backend& backend, const Tensor& t, uint64_t seed) {
  backend.fill_linear({t.data, t.dtype, t.rows, t.cols, nullptr}, seed);
}

namespace {

// Adds the floor of each op, and how much of the bandwidth it reached.
void add_floor(json& rows, double bandwidth) {
  if (!rows.is_array()) return;
  for (json& row : rows) {
    row["floor_us"] = row["bytes"].get<double>() / bandwidth * 1e6;
    row["share"] = row["floor_us"].get<double>() / row["us"].get<double>();
  }
}

void print_linears(const json& rows) {
  std::printf("\n%-20s %5s %9s %9s %7s %9s %9s %10s\n", "product", "rows", "us", "floor us",
              "share", "cuBLAS", "free", "invariance");
  for (const json& row : rows) {
    const double us = row["us"];
    const double free_us = row["free_us"];
    std::printf("%-20s %5ld %9.2f %9.2f %6.0f%% %9.2f %9.2f %+9.1f%%\n",
                row["op"].get<std::string>().c_str(), row["rows"].get<long>(), us,
                row["floor_us"].get<double>(), 100 * row["share"].get<double>(),
                row["cublas_us"].get<double>(), free_us, 100 * (us / free_us - 1));
  }
}

void print_rows(const json& rows, const char* title, const char* first, const char* second) {
  std::printf("\n%-20s %10s %9s %9s %7s\n", title, second, "us", "floor us", "share");
  for (const json& row : rows) {
    std::printf("%-20ld %10ld %9.2f %9.2f %6.0f%%\n", row[first].get<long>(),
                row[second].get<long>(), row["us"].get<double>(), row["floor_us"].get<double>(),
                100 * row["share"].get<double>());
  }
}

void print_part(const std::string& part, const json& result) {
  if (part == "linears") return print_linears(result);
  if (part == "attention") return print_rows(result, "attention, context", "context", "rows");
  if (part == "drafting") return print_rows(result, "draft level, head", "vocab_size", "topk");
  std::printf("\n%s %s\n", part.c_str(), result.dump(2).c_str());
}

// Written after each part: what was measured stays if a later one fails or takes too long.
void write_report(const json& report, const std::string& path) {
  std::ofstream file(path);
  file << report.dump(1) << "\n";
  FRSPEC_CHECK(file.good(), RequestError, path, ": cannot be written");
}

int run(Settings settings, const std::vector<std::string>& parts, const std::string& json_file) {
  Bench bench{
      settings, read_model_config(settings.model), read_eagle_config(settings.drafter), 0, {}};
  const std::unique_ptr<Backend> backend = bench.make_backend();
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, settings.device), "asking for the properties");
  bench.multiprocessors = properties.multiProcessorCount;
  if (settings.rotated_bytes == 0) {
    bench.settings.rotated_bytes =
        std::max(kLeastRotatedBytes, kRotatedL2Caches * properties.l2CacheSize);
  }
  json report = {{"model", settings.model},
                 {"device", backend->info().description},
                 {"repeats", settings.repeats}};
  std::printf("%s\n", report["device"].get<std::string>().c_str());
  bench.bandwidths.push_back(backend->measure_bandwidth());
  for (const std::string& part : parts) {
    if (part == "linears") report[part] = measure_linears(bench);
    if (part == "attention") report[part] = measure_attention(bench);
    if (part == "drafting") report[part] = measure_drafting(bench);
    if (part == "upload") report[part] = measure_upload(bench);
    if (part == "memory") report[part] = measure_memory(bench);
    const double bandwidth = median(bench.bandwidths);
    report["bandwidth_bytes_per_s"] = bandwidth;
    for (json& each : report) add_floor(each, bandwidth);
    print_part(part, report[part]);
    std::fflush(stdout);
    if (!json_file.empty()) write_report(report, json_file);
  }
  std::printf("\ncopies at %.1f GB/s, bytes read and written\n",
              report["bandwidth_bytes_per_s"].get<double>() * 1e-9);
  return 0;
}

}  // namespace
}  // namespace frspec::cuda::bench

int main(int argc, char** argv) {
  using namespace frspec::cuda::bench;
  Settings settings;
  std::vector<std::string> parts = kParts;
  std::vector<int> tree{settings.tree.depth, settings.tree.topk, settings.tree.tokens};
  std::string json_file;
  CLI::App app{"Measures the parts of decoding on a GPU.", "bench_cuda"};
  app.add_option("--model", settings.model, "model folder, e.g. of frspec make-synthetic")
      ->required();
  app.add_option("--drafter", settings.drafter, "EAGLE drafter of the model")->required();
  app.add_option("--ranking", settings.ranking, "ranking file, for the part memory");
  app.add_option("--device", settings.device, "number of the GPU")->check(CLI::NonNegativeNumber);
  app.add_option("--only", parts, "parts to measure")->check(CLI::IsMember(kParts));
  app.add_option("--rows", settings.rows, "tokens of each product")->check(CLI::Range(1, 256));
  app.add_option("--contexts", settings.contexts, "lengths for attention")
      ->check(CLI::Range(1, 1 << 20));
  app.add_option("--sub-vocab", settings.sub_vocab, "columns of the sub-vocabulary head")
      ->check(CLI::PositiveNumber);
  app.add_option("--tree", tree, "depth, topk and tokens of the draft tree")->expected(3);
  app.add_option("--repeats", settings.repeats, "timed runs of each")->check(CLI::Range(1, 10000));
  app.add_option("--rotate-bytes", settings.rotated_bytes,
                 "size of the copies that take turns; 0: eight L2 caches, at least 256 MiB")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--json", json_file, "also write the report to this file");
  CLI11_PARSE(app, argc, argv);
  settings.tree = {tree[0], tree[1], tree[2]};
  try {
    return run(settings, parts, json_file);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_cuda: error: %s\n", error.what());
    return 2;
  }
}
