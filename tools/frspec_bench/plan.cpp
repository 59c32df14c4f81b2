// What is measured, and what of it is in memory together.
#include <algorithm>
#include <chrono>
#include <fstream>
#include <iterator>
#include <sstream>

#include "bench.h"

namespace frspec::bench {
namespace {

constexpr const char* kExpected =
    ": expected token ids, separated by white space or as a JSON list";

std::vector<int32_t> read_tokens(const std::string& path) {
  std::vector<int32_t> tokens;
  std::ifstream file(path);
  FRSPEC_CHECK(file, RequestError, path, ": cannot be read");
  std::string text(std::istreambuf_iterator<char>(file), {});
  for (char& each : text) {
    if (each == '[' || each == ',' || each == ']') each = ' ';
  }
  std::istringstream numbers(text);
  while (!(numbers >> std::ws).eof()) {
    int32_t token = 0;
    FRSPEC_CHECK(numbers >> token, RequestError, path, kExpected);
    tokens.push_back(token);
  }
  FRSPEC_CHECK(!tokens.empty(), RequestError, path, kExpected);
  return tokens;
}

std::vector<int32_t> make_up_tokens(int64_t length, int64_t vocab) {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < length; ++i) {
    tokens.push_back(static_cast<int32_t>((i * 7919 + 101) % vocab));
  }
  return tokens;
}

std::vector<Prompt> make_prompts(const Settings& settings, int64_t vocab) {
  std::vector<Prompt> prompts;
  for (const std::string& path : settings.prompt_files) {
    prompts.push_back({path, read_tokens(path)});
    for (const int32_t token : prompts.back().tokens) {
      FRSPEC_CHECK(token >= 0 && token < vocab, RequestError, path, ": expected token ids of [0, ",
                   vocab, "), found ", token);
    }
  }
  if (!prompts.empty()) return prompts;
  for (const int64_t length : settings.prompt_lengths) {
    prompts.push_back({"", make_up_tokens(length, vocab)});
  }
  return prompts;
}

EngineOptions with_configuration(EngineOptions options, const Configuration& configuration) {
  if (!configuration.drafter.empty()) {
    options.drafter = configuration.drafter;
    if (!read_medusa_config(configuration.drafter)) options.medusa_tree.reset();
  }
  options.draft_vocab_size = configuration.vocab_size;
  options.tree = configuration.tree;
  options.plant = configuration.accept_length > 0;
  return options;
}

}  // namespace

Plan make_plan(const Settings& settings) {
  Plan plan;
  plan.engine = settings.engine;
  plan.prompts = make_prompts(settings, read_model_config(settings.engine.model).vocab_size);
  size_t longest = 0;
  for (const Prompt& prompt : plan.prompts) longest = std::max(longest, prompt.tokens.size());
  const int64_t needed = static_cast<int64_t>(longest) + settings.new_tokens + 1;
  if (plan.engine.max_context == 0) plan.engine.max_context = needed;
  FRSPEC_CHECK(plan.engine.max_context >= needed, RequestError, "max_context: expected at least ",
               needed, " tokens for the longest prompt and its text, found ",
               plan.engine.max_context);

  const auto has_heads = [](const Configuration& each) {
    return !each.drafter.empty() && read_medusa_config(each.drafter).has_value();
  };
  const std::vector<Configuration>& all = settings.configurations;
  FRSPEC_CHECK(!plan.engine.medusa_tree || std::any_of(all.begin(), all.end(), has_heads),
               RequestError, "--medusa-choices: expected a Medusa drafter, found none");
  size_t bytes = 0;
  size_t available = 0;
  for (const Configuration& each : settings.configurations) {
    const Engine engine(with_configuration(plan.engine, each));
    if (each.accept_length > 0) engine.check_accept_length(each.accept_length);
    const DeviceInfo device = engine.device();
    plan.device = device.description;
    available = device.available_bytes;
    bytes += engine.plan().total_bytes();
  }
  const size_t limit = plan.engine.memory_limit;
  if (limit > 0) available = std::min(available, limit);
  plan.together = bytes <= available || settings.configurations.size() == 1;
  if (plan.together) {
    plan.groups.push_back(settings.configurations);
  } else {
    for (const Configuration& each : settings.configurations) plan.groups.push_back({each});
  }
  return plan;
}

std::vector<Loaded> load(const EngineOptions& options, const std::vector<Configuration>& group) {
  using Clock = std::chrono::steady_clock;
  std::vector<Loaded> engines;
  for (const Configuration& each : group) {
    const Clock::time_point start = Clock::now();
    auto engine = std::make_unique<Engine>(with_configuration(options, each));
    engine->load();
    engines.push_back(
        {each, std::move(engine), std::chrono::duration<double>(Clock::now() - start).count()});
  }
  return engines;
}

}  // namespace frspec::bench
