// What was measured, as tables and as JSON.
#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "bench.h"

namespace frspec::bench {
namespace {

constexpr const char* kStageNames[kDraftStages] = {"embedding", "layers", "head", "topk", "tree"};

template <typename... Arguments>
std::string format(const char* pattern, Arguments... arguments) {
  char text[128];
  std::snprintf(text, sizeof text, pattern, arguments...);
  return text;
}

double median(const std::vector<double>& values) { return quantile(values, 0.5); }

double floor_ms(const Run& run) {
  return static_cast<double>(run.step_bytes) / run.bandwidth * 1e3;
}

double accept_length(const Samples& samples) {
  return static_cast<double>(samples.emitted) / static_cast<double>(samples.rounds);
}

// A plain round is a pass of the target and nothing else to speak of.
double plain_share(const Run& run) { return floor_ms(run) / median(run.plain.round); }
double drafted_share(const Run& run) { return floor_ms(run) / median(run.drafted.verify); }

// Of the time of drafting, in the median round: a round in which a graph is recorded counts little.
double stage_share(const Samples& profiled, size_t stage) {
  std::vector<double> shares;
  for (size_t i = 0; i < profiled.draft.size(); ++i) {
    shares.push_back(profiled.stages[stage][i] / profiled.draft[i]);
  }
  return median(shares);
}

// ==== Tables

// Columns as wide as their widest cell: the first to the left, the others to the right.
void print_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<int> widths(rows.front().size(), 0);
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      widths[i] = std::max(widths[i], static_cast<int>(row[i].size()));
    }
  }
  for (const auto& row : rows) {
    std::string line = format("%-*s", widths[0], row[0].c_str());
    for (size_t i = 1; i < row.size(); ++i) line += format("  %*s", widths[i], row[i].c_str());
    std::printf("%s\n", line.substr(0, line.find_last_not_of(' ') + 1).c_str());
  }
  std::printf("\n");
}

std::string number(double value) {
  return format("%.*f", value < 10 ? 3 : value < 100 ? 2 : 1, value);
}

std::string spread(const std::vector<double>& values) {
  return number(median(values)) + " (" + number(quantile(values, 0.1)) + " to " +
         number(quantile(values, 0.9)) + ")";
}

std::string ratio(const std::vector<double>& values) {
  if (values.empty()) return "";
  return format("%.2fx (%.2f to %.2f)", median(values), quantile(values, 0.1),
                quantile(values, 0.9));
}

std::string percent(double share) { return format("%.0f%%", 100 * share); }

std::string size_name(const Configuration& configuration) {
  return configuration.vocab_size == 0 ? "full" : std::to_string(configuration.vocab_size);
}

// With the drafter's folder where two runs of one method have another.
std::string run_name(const std::vector<Run>& runs, const Run& run) {
  const bool named = std::any_of(runs.begin(), runs.end(), [&](const Run& other) {
    return other.method == run.method && other.configuration.drafter != run.configuration.drafter;
  });
  std::string name = run.method == Method::kMedusa ? "Medusa" : "EAGLE-2";
  if (named) {
    name += concat(" ", std::filesystem::path(run.configuration.drafter).filename().string());
  }
  return concat(name, " ", size_name(run.configuration), " ", run.tree.depth, "x", run.tree.topk,
                "x", run.tree.tokens,
                run.tree.min_probability > 0 ? concat("@", run.tree.min_probability) : "");
}

void print_speed(const std::vector<Run>& runs) {
  const Run& first = runs.front();
  const bool drafts = first.method != Method::kPlain;
  const auto memory = [](const Run& run) {
    return format("%.3f", static_cast<double>(run.memory_bytes) * 1e-9);
  };
  const auto speed = [](const Samples& samples) {
    return format("%.1f", median(samples.tokens_per_second));
  };
  std::vector<std::vector<std::string>> rows = {{"", "tokens/s", "over plain", "over the first",
                                                 "accepted", "first token ms", "memory GB",
                                                 "text"}};
  rows.push_back({"plain", speed(first.plain), "1.00x", "", "1.00", spread(first.plain.first_token),
                  drafts ? "" : memory(first), ""});
  for (const Run& run : runs) {
    if (!drafts) continue;
    rows.push_back({run_name(runs, run), speed(run.drafted), ratio(run.over_plain),
                    ratio(run.over_first), format("%.2f", accept_length(run.drafted)),
                    spread(run.drafted.first_token), memory(run),
                    run.same_text ? "same" : "DIFFERENT"});
  }
  print_table(rows);
}

void print_rounds(const std::vector<Run>& runs) {
  const Run& first = runs.front();
  std::vector<std::vector<std::string>> rows = {
      {"ms of a round", "whole", "drafting", "verification", "over plain", "of the floor"}};
  rows.push_back({"plain", spread(first.plain.round), "", spread(first.plain.verify), "1.00x",
                  percent(plain_share(first))});
  for (const Run& run : runs) {
    if (run.method == Method::kPlain) continue;
    rows.push_back({run_name(runs, run), spread(run.drafted.round), spread(run.drafted.draft),
                    spread(run.drafted.verify), ratio(run.verify_over_plain),
                    percent(drafted_share(run))});
  }
  print_table(rows);
}

void print_breakdown(const std::vector<Run>& runs) {
  std::vector<std::vector<std::string>> rows = {
      {"ms of drafting", "all of it", "embedding", "layers", "head", "softmax, top-k", "tree"}};
  for (const Run& run : runs) {
    if (run.profiled.draft.empty()) continue;
    std::vector<std::string> row = {run_name(runs, run), number(median(run.profiled.draft))};
    for (size_t i = 0; i < kDraftStages; ++i) {
      row.push_back(number(median(run.profiled.stages[i])) + " " +
                    format("%4s", percent(stage_share(run.profiled, i)).c_str()));
    }
    rows.push_back(row);
  }
  if (rows.size() > 1) print_table(rows);
}

// ==== JSON

json quantiles(const std::vector<double>& values) {
  return {
      {"median", median(values)}, {"p10", quantile(values, 0.1)}, {"p90", quantile(values, 0.9)}};
}

json describe_samples(const Samples& samples) {
  return {{"tokens_per_s", quantiles(samples.tokens_per_second)},
          {"first_token_ms", quantiles(samples.first_token)},
          {"round_ms", quantiles(samples.round)},
          {"draft_ms", quantiles(samples.draft)},
          {"verify_ms", quantiles(samples.verify)},
          {"accept_length", accept_length(samples)}};
}

json describe_breakdown(const Samples& profiled) {
  json stages = json::object();
  for (size_t i = 0; i < kDraftStages; ++i) {
    json& stage = stages[kStageNames[i]] = quantiles(profiled.stages[i]);
    stage["share"] = stage_share(profiled, i);
  }
  return {{"draft_ms", quantiles(profiled.draft)}, {"stages_ms", stages}};
}

}  // namespace

void print_runs(const Settings& settings, const std::vector<Run>& runs) {
  const Run& first = runs.front();
  const std::string source = first.prompt_file.empty() ? "made up" : first.prompt_file;
  std::printf(
      "Prompt of %zu tokens (%s), %ld new tokens, %d turn%s. Medians (10th to 90th"
      " percentile).\n",
      first.prompt_tokens, source.c_str(), static_cast<long>(settings.new_tokens), settings.repeats,
      settings.repeats == 1 ? "" : "s");
  std::printf("Memory gives %.1f GB/s, a plain step reads %.3f GB: floor %s ms.\n\n",
              first.bandwidth * 1e-9, static_cast<double>(first.step_bytes) * 1e-9,
              number(floor_ms(first)).c_str());
  print_speed(runs);
  print_rounds(runs);
  print_breakdown(runs);
  std::fflush(stdout);
}

json describe(const Run& run) {
  json result = {{"prompt_tokens", run.prompt_tokens},  {"load_s", run.load_seconds},
                 {"memory_bytes", run.memory_bytes},    {"bandwidth_bytes_per_s", run.bandwidth},
                 {"step_bytes", run.step_bytes},        {"floor_ms", floor_ms(run)},
                 {"plain", describe_samples(run.plain)}};
  result["plain"].erase("draft_ms");
  result["plain"]["share_of_floor"] = plain_share(run);
  if (!run.prompt_file.empty()) result["prompt_file"] = run.prompt_file;
  if (run.method == Method::kPlain) return result;
  result["drafter"] = run.configuration.drafter;
  result["vocab_size"] = size_name(run.configuration);
  result["tree"] = {run.tree.depth, run.tree.topk, run.tree.tokens};
  result["tree_min_probability"] = run.tree.min_probability;
  json& drafted = result["drafted"] = describe_samples(run.drafted);
  drafted["method"] = method_name(run.method);
  drafted["over_plain"] = quantiles(run.over_plain);
  if (!run.over_first.empty()) drafted["over_first"] = quantiles(run.over_first);
  drafted["verify_over_plain"] = quantiles(run.verify_over_plain);
  drafted["share_of_floor"] = drafted_share(run);
  drafted["same_text"] = run.same_text;
  if (run.configuration.accept_length > 0) {
    drafted["planted_accept_length"] = run.configuration.accept_length;
  }
  if (!run.profiled.draft.empty()) drafted["breakdown"] = describe_breakdown(run.profiled);
  return result;
}

}  // namespace frspec::bench
