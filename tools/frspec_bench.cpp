// frspec-bench: how long each part of decoding takes, from the backend's own time stamps.
//
// Every drafted configuration is measured beside plain decoding in the same engine, turn by turn,
// so that their ratio holds on a machine whose speed changes. The share of the floor is weight
// bytes of a plain step over the memory's bandwidth, measured in the same run, over the step's
// time.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "engine.h"

namespace frspec {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

struct Options {
  EngineOptions engine;
  std::string model;
  std::string drafter;
  std::string ranking;
  std::string dtype;
  std::vector<std::string> vocab_sizes{"full"};
  std::vector<int> tree;
  std::string token_ids;
  std::vector<int32_t> prompt;  // of that file
  int64_t prompt_tokens = 512;
  int64_t new_tokens = 128;
  int repeats = 3;
  int warm_up = 1;
  float temperature = 0.0f;
  uint64_t seed = 0;
  std::vector<double> accept_lengths;  // to plant, one for each vocabulary size
  std::string json_file;
};

// Milliseconds of the rounds of one configuration.
struct Samples {
  std::vector<double> round, draft, verify;
  std::vector<double> prefill;            // of each request
  std::vector<double> tokens_per_second;  // of each request, after its first token
  int64_t emitted = 0;
  int64_t rounds = 0;

  double accept_length() const {
    return rounds == 0 ? 0.0 : static_cast<double>(emitted) / static_cast<double>(rounds);
  }
};

double quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1) + 0.5)];
}

json quantiles(const std::vector<double>& values) {
  return {{"median", quantile(values, 0.5)},
          {"p10", quantile(values, 0.1)},
          {"p90", quantile(values, 0.9)}};
}

std::vector<int32_t> read_prompt(const std::string& path) {
  std::vector<int32_t> prompt;
  std::ifstream file(path);
  FRSPEC_CHECK(file, RequestError, path, ": cannot be read");
  for (int32_t token; file >> token;) prompt.push_back(token);
  FRSPEC_CHECK(file.eof() && !prompt.empty(), RequestError, path,
               ": expected token ids, separated by white space");
  return prompt;
}

std::vector<int32_t> make_up_prompt(int64_t length, int64_t vocab) {
  std::vector<int32_t> prompt;
  for (int64_t i = 0; i < length; ++i) {
    prompt.push_back(static_cast<int32_t>((i * 7919 + 101) % vocab));
  }
  return prompt;
}

int64_t parse_vocab_size(const std::string& text) {  // 0: the full vocabulary
  if (text == "full") return 0;
  int64_t size = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, size);
  FRSPEC_CHECK(error == std::errc() && stop == end && size > 0, RequestError,
               "--vocab-sizes: expected a number or full, found '", text, "'");
  return size;
}

// Generates once; adds to `samples` unless it is null. Returns the tokens.
std::vector<int32_t> generate(Engine& engine, const std::vector<int32_t>& prompt,
                              const Request& request, Samples* samples) {
  std::vector<int32_t> tokens;
  engine.start(prompt, request);
  Timings before = engine.timings();
  double decode = 0;
  while (!engine.finished()) {
    const bool in_prompt = tokens.empty();
    const Clock::time_point start = Clock::now();
    const auto step = engine.step();
    const double milliseconds =
        std::chrono::duration<double, std::milli>(Clock::now() - start).count();
    tokens.insert(tokens.end(), step.begin(), step.end());
    const Timings after = engine.timings();
    if (!in_prompt) decode += milliseconds;
    if (samples != nullptr && !in_prompt) {
      samples->round.push_back(milliseconds);
      samples->draft.push_back((after.draft - before.draft) * 1e3);
      samples->verify.push_back((after.verify - before.verify) * 1e3);
      samples->emitted += static_cast<int64_t>(step.size());
      ++samples->rounds;
    }
    before = after;
  }
  if (samples != nullptr) {
    samples->prefill.push_back(engine.timings().prefill * 1e3);
    samples->tokens_per_second.push_back(static_cast<double>(tokens.size() - 1) / decode * 1e3);
  }
  return tokens;
}

json describe(const Samples& samples) {
  return {{"round_ms", quantiles(samples.round)},
          {"draft_ms", quantiles(samples.draft)},
          {"verify_ms", quantiles(samples.verify)},
          {"prefill_ms", quantiles(samples.prefill)},
          {"tokens_per_s", quantile(samples.tokens_per_second, 0.5)},
          {"accept_length", samples.accept_length()}};
}

void print_row(const char* name, const Samples& samples, double speed_up, double share) {
  std::printf("%-24s %9.1f %8.2fx %7.2f %9.3f %9.3f %9.3f", name,
              quantile(samples.tokens_per_second, 0.5), speed_up, samples.accept_length(),
              quantile(samples.round, 0.5), quantile(samples.draft, 0.5),
              quantile(samples.verify, 0.5));
  if (share > 0) std::printf(" %8.0f%%", 100 * share);
  std::printf("\n");
}

// One engine: plain decoding, and with a drafter drafted rounds beside it.
json measure(const Options& options, size_t number, bool first) {
  EngineOptions engine_options = options.engine;
  const bool drafts = !options.drafter.empty();
  const std::string size = options.vocab_sizes[number];
  if (drafts) engine_options.vocab_size = parse_vocab_size(size);
  engine_options.plant = !options.accept_lengths.empty();
  Engine engine(engine_options);
  const Clock::time_point load_start = Clock::now();
  engine.load();
  const double load_seconds = std::chrono::duration<double>(Clock::now() - load_start).count();

  const std::vector<int32_t> prompt =
      options.prompt.empty() ? make_up_prompt(options.prompt_tokens, engine.config().vocab_size)
                             : options.prompt;
  Request plain;
  plain.sampling.temperature = options.temperature;
  plain.sampling.seed = options.seed;
  plain.max_new_tokens = options.new_tokens + 1;
  plain.ignore_eos = true;
  Request drafted = plain;
  drafted.method = engine.draft_method();

  const std::vector<int32_t> text = generate(engine, prompt, plain, nullptr);
  if (engine_options.plant && drafts) {
    std::vector<int32_t> recorded = prompt;
    recorded.insert(recorded.end(), text.begin(), text.end());
    engine.plant(recorded, options.accept_lengths[number]);
  }
  for (int i = 0; drafts && i < options.warm_up; ++i) generate(engine, prompt, drafted, nullptr);

  Samples plain_samples;
  Samples drafted_samples;
  std::vector<double> speed_ups;
  std::vector<double> verify_ratios;
  std::vector<double> bandwidths;
  bool same = true;
  for (int i = 0; i < options.repeats; ++i) {
    bandwidths.push_back(engine.measure_bandwidth());
    generate(engine, prompt, plain, &plain_samples);
    if (!drafts) continue;
    same = same && generate(engine, prompt, drafted, &drafted_samples) == text;
    speed_ups.push_back(drafted_samples.tokens_per_second.back() /
                        plain_samples.tokens_per_second.back());
  }
  const double bandwidth = quantile(bandwidths, 0.5);
  const double floor_ms = static_cast<double>(engine.step_bytes()) / bandwidth * 1e3;
  const double share = floor_ms / quantile(plain_samples.round, 0.5);
  const double verify_ratio =
      quantile(drafted_samples.verify, 0.5) / quantile(plain_samples.verify, 0.5);

  if (first) {
    std::printf("%s\nbandwidth %.1f GB/s, a plain step reads %.3f GB: floor %.3f ms\n\n",
                engine.device().description.c_str(), bandwidth * 1e-9,
                static_cast<double>(engine.step_bytes()) * 1e-9, floor_ms);
    std::printf("%-24s %9s %9s %7s %9s %9s %9s %9s\n", "", "tokens/s", "speed-up", "accept",
                "round ms", "draft ms", "verify ms", "of floor");
    print_row("plain", plain_samples, 1.0, share);
  }
  const TreeShape& tree = engine.tree();
  json result = {{"vocab_size", size},
                 {"tree", {tree.depth, tree.topk, tree.tokens}},
                 {"load_s", load_seconds},
                 {"memory_bytes", engine.plan().total_bytes()},
                 {"bandwidth_bytes_per_s", bandwidth},
                 {"step_bytes", engine.step_bytes()},
                 {"floor_ms", floor_ms},
                 {"plain", describe(plain_samples)}};
  result["plain"]["share_of_floor"] = share;
  if (drafts) {
    const char* method = engine.draft_method() == Method::kMedusa ? "Medusa, " : "EAGLE-2, ";
    const std::string name = method + (size == "full" ? "full vocabulary" : size + " tokens");
    print_row(name.c_str(), drafted_samples, quantile(speed_ups, 0.5), 0.0);
    std::printf("%24s verification %.3f x one token; text %s\n", "", verify_ratio,
                same ? "the same" : "DIFFERENT");
    result["drafted"] = describe(drafted_samples);
    result["drafted"]["speed_up"] = quantiles(speed_ups);
    result["drafted"]["verify_over_plain"] = verify_ratio;
    result["drafted"]["same_text"] = same;
    if (engine_options.plant) {
      result["drafted"]["planted_accept_length"] = options.accept_lengths[number];
    }
  }
  return result;
}

int run(Options options) {
  options.engine.model = options.model;
  if (!options.drafter.empty()) options.engine.drafter = options.drafter;
  if (!options.ranking.empty()) options.engine.ranking = options.ranking;
  if (!options.dtype.empty()) options.engine.dtype = options.dtype;
  if (!options.token_ids.empty()) {
    options.prompt = read_prompt(options.token_ids);
    options.prompt_tokens = static_cast<int64_t>(options.prompt.size());
  }
  if (options.engine.max_context == 0) {
    const int64_t tokens = options.prompt_tokens + options.new_tokens + 64;
    options.engine.max_context = (tokens + 127) / 128 * 128;
  }
  if (!options.tree.empty()) {
    options.engine.tree = {options.tree[0], options.tree[1], options.tree[2]};
  }
  FRSPEC_CHECK(
      options.accept_lengths.empty() || options.accept_lengths.size() == options.vocab_sizes.size(),
      RequestError, "--plant-accept-length: expected a length for each of the ",
      options.vocab_sizes.size(), " --vocab-sizes, found ", options.accept_lengths.size());
  if (!options.accept_lengths.empty()) {
    std::printf(
        "Accept lengths are planted: the drafter does its work, and what plain decoding"
        " wrote takes the place of its guesses.\n");
  }
  json report = {{"model", options.model},
                 {"prompt_tokens", options.prompt_tokens},
                 {"new_tokens", options.new_tokens},
                 {"repeats", options.repeats},
                 {"temperature", options.temperature},
                 {"planted", !options.accept_lengths.empty()}};
  const size_t runs = options.drafter.empty() ? 1 : options.vocab_sizes.size();
  bool same = true;
  for (size_t i = 0; i < runs; ++i) {
    report["runs"].push_back(measure(options, i, i == 0));
    const json& last = report["runs"].back();
    same = same && (!last.contains("drafted") || last["drafted"]["same_text"].get<bool>());
  }
  if (!options.json_file.empty()) {
    std::ofstream file(options.json_file);
    file << report.dump(2) << "\n";
    FRSPEC_CHECK(file.good(), RequestError, options.json_file, ": cannot be written");
  }
  return same ? 0 : 1;
}

}  // namespace
}  // namespace frspec

int main(int argc, char** argv) {
  frspec::Options options;
  CLI::App app{"Measures plain and speculative decoding, part by part.", "frspec-bench"};
  app.add_option("--model", options.model, "model folder")->required();
  app.add_option("--drafter", options.drafter, "EAGLE or Medusa drafter of the model");
  app.add_option("--ranking", options.ranking, "ranking file, for sub-vocabularies");
  app.add_option("--vocab-sizes", options.vocab_sizes, "columns of the draft head, or full");
  app.add_option("--tree", options.tree, "depth, topk and tokens of the draft tree")->expected(3);
  app.add_option("--device", options.engine.device, "cpu, cuda, cuda:N or auto");
  app.add_option("--dtype", options.dtype, "bf16, fp16 or fp32");
  app.add_option("--threads", options.engine.threads, "CPU threads; 0: all");
  app.add_option("--max-context", options.engine.max_context, "tokens of prompt and text");
  app.add_option("--token-ids", options.token_ids, "file of the prompt's token ids");
  app.add_option("--prompt-tokens", options.prompt_tokens, "length of a made-up prompt")
      ->check(CLI::Range(1, 1 << 20));
  app.add_option("--new-tokens", options.new_tokens, "tokens of each text")
      ->check(CLI::Range(1, 1 << 20));
  app.add_option("--repeats", options.repeats, "texts of each method")->check(CLI::Range(1, 10000));
  app.add_option("--warm-up", options.warm_up, "texts before them")->check(CLI::Range(0, 10000));
  app.add_option("--temperature", options.temperature, "0: greedy");
  app.add_option("--seed", options.seed, "of the sampling");
  app.add_option("--plant-accept-length", options.accept_lengths,
                 "plant plain decoding's text into the trees so that this many tokens are accepted"
                 " on average: one length for each vocabulary size");
  app.add_option("--json", options.json_file, "also write the report to this file");
  CLI11_PARSE(app, argc, argv);
  try {
    return frspec::run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "frspec-bench: error: %s\n", error.what());
    return 2;
  }
}
