// frspec-bench: how long each part of decoding takes, from the backend's own time stamps.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "bench.h"

namespace frspec::bench {
namespace {

constexpr const char* kDescription =
    "Measures plain and speculative decoding, part by part. Configurations (drafters, sizes of"
    " their heads, shapes of their trees) are loaded together where memory holds them and take"
    " turns with plain decoding; ratios are of texts in the same turn.";
constexpr const char* kExamples = R"(Examples:
  frspec-bench --model M --drafter D --ranking R.safetensors --vocab-sizes full 16384 \
      --trees 1x3x4 6x10x60 --prompt-tokens 128 2048          every size with every tree
  frspec-bench --model M --drafter D --ranking R.safetensors \
      --compare full 32768 16384:4x8x32 --token-ids prompt.txt    these three
docs/benchmark.md explains the columns.)";

// What the command line says, as it is written there.
struct Words {
  std::string ranking, dtype, json_file, medusa_choices;
  std::vector<std::string> drafters, vocab_sizes{"full"}, trees, compare;
  std::vector<double> accept_lengths;
  bool no_breakdown = false;
};

// The whole of `text` as a number above 0.
template <typename Number>
bool parse_number(std::string_view text, Number& number) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  return error == std::errc() && stop == end && number > 0;
}

int64_t parse_vocab_size(const char* option, const std::string& text) {  // 0: the full vocabulary
  int64_t size = 0;
  FRSPEC_CHECK(text == "full" || parse_number(text, size), RequestError, option,
               ": expected a number or full, found '", text, "'");
  return size;
}

TreeShape parse_tree(const char* option, const std::string& text) {
  TreeShape tree;
  const size_t first = text.find('x');
  const size_t second = first == std::string::npos ? first : text.find('x', first + 1);
  const size_t end = std::min(text.find('@'), text.size());
  FRSPEC_CHECK(second != std::string::npos && parse_number(text.substr(0, first), tree.depth) &&
                   parse_number(text.substr(first + 1, second - first - 1), tree.topk) &&
                   parse_number(text.substr(second + 1, end - second - 1), tree.tokens) &&
                   (end == text.size() || text.substr(end) == "@0" ||
                    parse_number(text.substr(end + 1), tree.min_probability)),
               RequestError, option,
               ": expected DEPTHxTOPKxTOKENS or DEPTHxTOPKxTOKENS@MIN_PROBABILITY, for example"
               " 6x10x60, found '",
               text, "'");
  return tree;
}

// A published tree by its name, or a file with a JSON list of paths.
MedusaTreeOptions read_medusa_choices(const std::string& text) {
  MedusaTreeOptions options;
  options.published = text;
  if (!std::filesystem::exists(text)) return options;
  std::ifstream file(text);
  const json paths = json::parse(file, nullptr, false);
  try {
    options.paths = paths.get<MedusaChoices>();
  } catch (const json::exception&) {
    throw RequestError(concat(text, ": expected a JSON list of paths such as [[0], [0, 0], [1]]"));
  }
  FRSPEC_CHECK(!options.paths.empty(), RequestError, text, ": expected at least one path");
  return options;
}

std::vector<Configuration> parse_configurations(const Words& words) {
  std::vector<Configuration> configurations;
  for (const std::string& text : words.compare) {
    const size_t colon = text.find(':');
    Configuration each;
    each.vocab_size = parse_vocab_size("--compare", text.substr(0, colon));
    if (colon != std::string::npos) each.tree = parse_tree("--compare", text.substr(colon + 1));
    configurations.push_back(each);
  }
  if (words.compare.empty()) {
    std::vector<std::optional<TreeShape>> trees;
    for (const std::string& text : words.trees) trees.push_back(parse_tree("--trees", text));
    if (trees.empty()) trees.push_back(std::nullopt);
    for (const std::string& text : words.vocab_sizes) {
      const int64_t size = parse_vocab_size("--vocab-sizes", text);
      for (const auto& tree : trees) configurations.push_back({"", size, tree, 0});
    }
  }
  if (!words.drafters.empty()) {
    std::vector<Configuration> of_all;
    for (const std::string& drafter : words.drafters) {
      for (Configuration each : configurations) {
        each.drafter = drafter;
        of_all.push_back(each);
      }
    }
    configurations = of_all;
  }
  const std::vector<double>& lengths = words.accept_lengths;
  FRSPEC_CHECK(lengths.empty() || lengths.size() == configurations.size(), RequestError,
               "--plant-accept-length: expected a length for each of the ", configurations.size(),
               " configurations, found ", lengths.size());
  for (size_t i = 0; i < lengths.size(); ++i) {
    FRSPEC_CHECK(std::isfinite(lengths[i]) && lengths[i] >= 1, RequestError,
                 "--plant-accept-length: expected numbers from 1 on, found ", lengths[i]);
    configurations[i].accept_length = lengths[i];
  }
  return configurations;
}

// Before minutes are spent: whether the report can be written. Nothing is written or left.
void check_writable(const std::string& path) {
  const bool existed = std::filesystem::exists(path);
  const bool good = std::ofstream(path, std::ios::app).good();
  if (good && !existed) std::filesystem::remove(path);
  FRSPEC_CHECK(good, RequestError, path, ": cannot be written");
}

// Written after each prompt, beside the file and renamed: what was measured stays if a later one
// fails or takes too long, or the disk is full.
void write_report(const json& report, const std::string& path) {
  const bool is_file = !std::filesystem::exists(path) || std::filesystem::is_regular_file(path);
  const std::string place = is_file ? path + ".new" : path;
  std::ofstream file(place);
  file << report.dump(2) << "\n";
  file.close();
  if (!file.good() && is_file) std::filesystem::remove(place);
  FRSPEC_CHECK(file.good(), RequestError, path, ": cannot be written");
  if (is_file) std::filesystem::rename(place, path);
}

int run(Settings settings, const Words& words) {
  if (!words.ranking.empty()) settings.engine.ranking = words.ranking;
  if (!words.dtype.empty()) settings.engine.dtype = words.dtype;
  if (!words.medusa_choices.empty()) {
    settings.engine.medusa_tree = read_medusa_choices(words.medusa_choices);
  }
  settings.breakdown = !words.no_breakdown;
  settings.configurations = parse_configurations(words);
  if (!words.json_file.empty()) check_writable(words.json_file);
  const Plan plan = make_plan(settings);

  const bool planted = !words.accept_lengths.empty();
  if (planted) {
    std::printf(
        "Accept lengths are planted: the drafter does its work, and what plain decoding"
        " wrote takes the place of its guesses.\n");
  }
  if (!plan.together) {
    std::printf(
        "Memory does not hold all configurations at once: each has turns of its own with"
        " plain decoding, and none is compared with another.\n");
  }
  std::printf("%s\n\n", plan.device.c_str());
  json report = {{"model", settings.engine.model},
                 {"device", plan.device},
                 {"new_tokens", settings.new_tokens},
                 {"repeats", settings.repeats},
                 {"temperature", settings.sampling.temperature},
                 {"seed", settings.sampling.seed},
                 {"planted", planted},
                 {"together", plan.together},
                 {"runs", json::array()}};
  bool same = true;
  for (const std::vector<Configuration>& group : plan.groups) {
    const std::vector<Loaded> engines = load(plan.engine, group);
    for (const Prompt& prompt : plan.prompts) {
      const std::vector<Run> runs = measure(settings, engines, prompt);
      print_runs(settings, runs);
      for (const Run& each : runs) {
        report["runs"].push_back(describe(each));
        same = same && each.same_text;
      }
      if (!words.json_file.empty()) write_report(report, words.json_file);
    }
  }
  return same ? 0 : 1;
}

}  // namespace
}  // namespace frspec::bench

int main(int argc, char** argv) {
  using namespace frspec::bench;
  Settings settings;
  Words words;
  CLI::App app{kDescription, "frspec-bench"};
  app.footer(kExamples);
  app.failure_message([](const CLI::App*, const CLI::Error& error) {
    return std::string("frspec-bench: error: ") + error.what() + "\n";
  });

  app.add_option("--model", settings.engine.model, "model folder")
      ->required()
      ->option_text("FOLDER (required)");
  app.add_option("--device", settings.engine.device, "cpu, cuda, cuda:N or auto (the default)")
      ->option_text("NAME");
  app.add_option("--dtype", words.dtype, "bf16, fp16 or fp32 (default: as stored)")
      ->option_text("TYPE");
  app.add_option("--threads", settings.engine.threads, "of the CPU (default: all)")
      ->check(CLI::NonNegativeNumber)
      ->option_text("N");
  app.add_option("--max-context", settings.engine.max_context,
                 "tokens of prompt and text (default: what they need)")
      ->check(CLI::PositiveNumber)
      ->option_text("N");
  app.add_option("--memory-limit", settings.engine.memory_limit,
                 "such as 2GB, 512MiB or a number of bytes (default: what the device has)")
      ->transform(CLI::AsSizeValue(true))
      ->option_text("SIZE");
  app.add_option("--json", words.json_file, "also write the report to this file")
      ->option_text("FILE");

  CLI::Option* drafter =
      app.add_option("--drafter", words.drafters,
                     "EAGLE or Medusa drafters (default: plain decoding alone); each is measured"
                     " in all configurations")
          ->option_text("FOLDER...");
  CLI::Option* choices =
      app.add_option("--medusa-choices", words.medusa_choices,
                     "tree of Medusa drafters: the name of a published one, or a file with a JSON"
                     " list of paths (default: mc_sim_7b_63, as much of it as --trees says)")
          ->option_text("NAME|FILE");
  CLI::Option* ranking =
      app.add_option("--ranking", words.ranking, "of token ids, for sizes other than full")
          ->option_text("FILE");
  CLI::Option* sizes = app.add_option("--vocab-sizes", words.vocab_sizes,
                                      "columns of the draft head, full (the default) or a number;"
                                      " each is measured with each of --trees")
                           ->option_text("SIZE...");
  CLI::Option* trees = app.add_option("--trees", words.trees,
                                      "depth, top-k and tokens of the draft tree, such as 6x10x60,"
                                      " and on a CPU the least probability of a node, such as"
                                      " 4x4x8@0.06 (default: what suits the device)")
                           ->option_text("TREE...");
  CLI::Option* compare =
      app.add_option("--compare", words.compare,
                     "configurations one by one, in place of --vocab-sizes and --trees")
          ->excludes(sizes)
          ->excludes(trees)
          ->option_text("SIZE[:TREE]...");
  CLI::Option* plant =
      app.add_option("--plant-accept-length", words.accept_lengths,
                     "put plain decoding's text into the trees so often that this many tokens are"
                     " accepted in a round, on average: a length for each configuration")
          ->option_text("LENGTH...");
  CLI::Option* no_breakdown = app.add_flag("--no-breakdown", words.no_breakdown,
                                           "leave out the texts that time the stages of drafting");
  for (CLI::Option* option :
       {drafter, choices, ranking, sizes, trees, compare, plant, no_breakdown}) {
    option->group("What drafts");
    if (option != drafter) option->needs(drafter);
  }
  no_breakdown->option_text(" ");

  CLI::Option* lengths =
      app.add_option("--prompt-tokens", settings.prompt_lengths,
                     "lengths of made-up prompts (default: 512), each measured by itself")
          ->check(CLI::Range(1, 1 << 20))
          ->option_text("N...");
  CLI::Option* files =
      app.add_option("--token-ids", settings.prompt_files,
                     "prompts: token ids, separated by white space or as a JSON list")
          ->excludes(lengths)
          ->option_text("FILE...");
  CLI::Option* tokens = app.add_option("--new-tokens", settings.new_tokens,
                                       "of a text after its first (default: 128)")
                            ->check(CLI::Range(1, 1 << 20))
                            ->option_text("N");
  CLI::Option* temperature =
      app.add_option("--temperature", settings.sampling.temperature, "default: 0, greedy")
          ->option_text("T");
  CLI::Option* seed =
      app.add_option("--seed", settings.sampling.seed, "of the sampling (default: 0)")
          ->option_text("S");
  CLI::Option* repeats =
      app.add_option("--repeats", settings.repeats, "turns, a text of each (default: 3)")
          ->check(CLI::Range(1, 10000))
          ->option_text("N");
  CLI::Option* warm_up =
      app.add_option("--warm-up", settings.warm_up, "turns before them (default: 1)")
          ->check(CLI::Range(0, 10000))
          ->option_text("N");
  for (CLI::Option* option : {lengths, files, tokens, temperature, seed, repeats, warm_up}) {
    option->group("What is written");
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  try {
    const int code = run(settings, words);
    FRSPEC_CHECK(std::fflush(stdout) == 0 && std::ferror(stdout) == 0, frspec::Error,
                 "stdout: cannot be written");
    return code;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "frspec-bench: error: %s\n", error.what());
    return 2;
  }
}
