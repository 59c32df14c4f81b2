// What the parts of frspec-bench share: what to measure, and what was measured.
//
// A configuration is an engine that drafts: a drafter, a size of its head and a shape of its tree.
// All of them are in memory together where it holds them, and write the text turn by turn, plain
// decoding before them in every turn: a ratio is of texts beside each other, so that it holds on a
// machine whose speed changes. Where memory does not hold all, each configuration has its own turns
// with plain decoding.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "engine.h"

namespace frspec::bench {

using nlohmann::json;

struct Configuration {
  std::string drafter;            // folder; empty: none
  int64_t vocab_size = 0;         // columns of the draft head; 0: the full vocabulary
  std::optional<TreeShape> tree;  // absent: what suits the device
  double accept_length = 0;       // to plant; 0: none
};

struct Prompt {
  std::string file;  // of token ids; empty: made up
  std::vector<int32_t> tokens;
};

struct Settings {
  EngineOptions engine;  // what all configurations share; medusa_tree: those with Medusa heads
  std::vector<Configuration> configurations;  // without a drafter: one, which decodes plainly
  std::vector<std::string> prompt_files;
  std::vector<int64_t> prompt_lengths{512};  // of made-up prompts, where there are no files
  int64_t new_tokens = 128;                  // after the first
  int repeats = 3;
  int warm_up = 1;
  Sampling sampling;
  bool breakdown = true;  // of drafting
};

// What is settled before any weight is read.
struct Plan {
  EngineOptions engine;  // with the context that the prompts need
  std::string device;    // in words
  std::vector<Prompt> prompts;
  bool together = true;                            // all configurations are in memory at once
  std::vector<std::vector<Configuration>> groups;  // those that are
};

// A configuration whose weights are in memory.
struct Loaded {
  Configuration configuration;
  std::unique_ptr<Engine> engine;
  double load_seconds = 0;
};

// Of the texts of one method. Milliseconds, but for tokens_per_second.
struct Samples {
  std::vector<double> round, draft, verify;              // of each round
  std::vector<double> first_token;                       // of each text, from its start
  std::vector<double> tokens_per_second;                 // of each text, behind its first token
  std::vector<double> text_verify;                       // of each text: the median of its rounds
  std::array<std::vector<double>, kDraftStages> stages;  // of each round, where they were asked for
  int64_t emitted = 0;
  int64_t rounds = 0;
};

// A configuration over a prompt, with the plain decoding beside it.
struct Run {
  Configuration configuration;
  Method method = Method::kPlain;  // plain: without a drafter, and `plain` is all there is
  TreeShape tree;
  double load_seconds = 0;
  size_t memory_bytes = 0;  // planned
  std::string prompt_file;
  size_t prompt_tokens = 0;
  double bandwidth = 0;   // bytes per second
  size_t step_bytes = 0;  // that a plain step reads
  Samples plain;
  Samples drafted;
  Samples profiled;                       // of the texts with time stamps in their drafting
  std::vector<double> over_plain;         // tokens/s, a ratio for each turn
  std::vector<double> over_first;         // likewise, over the first drafted run beside this one
  std::vector<double> verify_over_plain;  // time of a verification over that of a plain one
  bool same_text = true;
};

// The share q of the values is below it; 0 where there are none.
double quantile(std::vector<double> values, double q);

// Plans every configuration and reads the prompts, so that what is wrong with any is said before
// minutes are spent. RequestError, ModelError, RankingError or DeviceError.
Plan make_plan(const Settings& settings);

std::vector<Loaded> load(const EngineOptions& options, const std::vector<Configuration>& group);

// The turns of a group over a prompt: one run for each engine.
std::vector<Run> measure(const Settings& settings, const std::vector<Loaded>& engines,
                         const Prompt& prompt);

// Tables of runs that were measured beside each other.
void print_runs(const Settings& settings, const std::vector<Run>& runs);
json describe(const Run& run);

}  // namespace frspec::bench
