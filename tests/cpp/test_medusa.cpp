// Medusa: its tree choices, its checkpoints, and the engine with it end to end.
#include <doctest/doctest.h>

#include <algorithm>
#include <set>
#include <tuple>

#include "engine.h"
#include "engine_driver.h"
#include "medusa_choices.h"
#include "tiny_model.h"

namespace frspec {
namespace {

using test::generate;
using test::make_request;

constexpr test::TinySizes kSizes;
const std::vector<int32_t> kPrompt = {3, 14, 15, 92, 65, 35, 89, 79};
const Sampling kSamplings[] = {{}, {1.0f, 0, 1.0f, 0.0f, 42}, {0.8f, 20, 0.9f, 0.01f, 7}};

EngineOptions medusa_options(const std::string& name, TreeShape tree,
                             const test::TinyMedusa& medusa = {}) {
  EngineOptions options;
  options.model = test::write_predictable_target("medusa_" + name + "_target", kSizes);
  options.drafter = test::write_predictable_medusa("medusa_" + name + "_heads", kSizes, medusa);
  options.device = "cpu";
  options.max_context = 160;
  options.threads = 2;
  options.tree = tree;
  return options;
}

double mean_accept_length(const Engine& engine) {
  double sum = 0;
  for (const int32_t length : engine.accept_lengths()) sum += length;
  return sum / static_cast<double>(engine.accept_lengths().size());
}

MedusaTreeOptions with_paths(MedusaChoices paths) {
  MedusaTreeOptions options;
  options.paths = std::move(paths);
  return options;
}

template <typename Doing>
std::string request_error(const Doing& doing) {
  try {
    doing();
  } catch (const RequestError& error) {
    return error.what();
  }
  FAIL("expected a RequestError");
  return "";
}

}  // namespace

TEST_CASE("every beginning of a published tree is a tree") {
  const std::vector<std::string> names = published_medusa_trees();
  CHECK(names.size() == 9);
  for (const std::string& name : names) {
    CAPTURE(name);
    const MedusaChoices paths = published_medusa_choices(name);
    CHECK(paths.size() == 63);
    std::set<MedusaPath> seen{{}};
    for (const MedusaPath& path : paths) {
      CHECK(seen.count(MedusaPath(path.begin(), path.end() - 1)) == 1);
      CHECK(seen.insert(path).second);
    }
  }
  const MedusaChoices paths = published_medusa_choices("mc_sim_7b_63");
  CHECK(paths[3] == MedusaPath{0, 1});
  CHECK(paths[36] == MedusaPath{0, 0, 0, 0});
  CHECK(paths[62] == MedusaPath{0, 7, 0});
}

TEST_CASE("the best paths for given accuracies equal brute force") {
  const std::vector<std::vector<double>> accuracies = {
      {0.61, 0.127, 0.053}, {0.41, 0.103, 0.293, 0.023}, {0.51}, {0.19, 0.239}};
  std::vector<std::pair<double, MedusaPath>> all;
  const auto grow = [&](const auto& self, double gain, const MedusaPath& parent) -> void {
    if (parent.size() == accuracies.size()) return;
    for (size_t rank = 0; rank < accuracies[parent.size()].size(); ++rank) {
      MedusaPath path = parent;
      path.push_back(static_cast<int32_t>(rank));
      all.emplace_back(gain * accuracies[parent.size()][rank], path);
      self(self, all.back().first, path);
    }
  };
  grow(grow, 1.0, {});
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (const size_t count : {size_t{0}, size_t{1}, size_t{7}, size_t{20}, all.size()}) {
    const MedusaChoices best = best_medusa_choices(accuracies, count);
    REQUIRE(best.size() == count);
    for (size_t i = 0; i < count; ++i) CHECK(best[i] == all[i].second);
  }
  CHECK(best_medusa_choices(accuracies, 1000).size() == all.size());
  CHECK(best_medusa_choices({{1.0, 0.0}, {0.5}}, 9) == MedusaChoices{{0}, {0, 0}});
  CHECK(best_medusa_choices({}, 9).empty());
  CHECK_THROWS_AS(best_medusa_choices({{0.5, 1.5}}, 4), RequestError);
  CHECK_THROWS_AS(best_medusa_choices({{std::nan("")}}, 4), RequestError);
}

TEST_CASE("a tree is planned from its paths") {
  const MedusaTree tree =
      plan_medusa_tree(with_paths({{1, 0}, {0}, {1}, {0, 0, 4}, {0, 0}}), {1, 1, 1}, 3, 100);
  CHECK(tree.depth == 3);
  CHECK(tree.width == 5);
  CHECK(tree.parents == std::vector<int32_t>{-1, 0, 0, 1, 2, 3});
  CHECK(tree.candidates == std::vector<int32_t>{0, 0, 1, 5, 5, 14});

  // A published one is cut to the shape, the heads and the columns.
  CHECK(plan_medusa_tree({}, {6, 10, 60}, 5, 1000).parents.size() == 60);
  CHECK(plan_medusa_tree({}, {6, 10, 256}, 5, 1000).parents.size() == 64);
  CHECK(plan_medusa_tree({}, {6, 10, 60}, 2, 1000).depth == 2);
  CHECK(plan_medusa_tree({}, {1, 10, 60}, 5, 1000).parents.size() == 11);
  CHECK(plan_medusa_tree({}, {6, 10, 60}, 5, 3).width == 3);
  CHECK(plan_medusa_tree({}, {6, 2, 60}, 5, 1000).width == 2);
  const MedusaTree root = plan_medusa_tree({}, {6, 10, 1}, 5, 1000);
  CHECK(root.depth == 0);
  CHECK(root.parents == std::vector<int32_t>{-1});
  MedusaTreeOptions made;
  made.accuracies = {{0.6, 0.1}, {0.4, 0.3}, {0.2, 0.1}};
  CHECK(plan_medusa_tree(made, {6, 10, 5}, 2, 1000).parents ==
        std::vector<int32_t>{-1, 0, 0, 1, 1});
}

TEST_CASE("choices that are no tree are refused by name") {
  const auto error = [](MedusaChoices paths, int64_t heads = 4, int64_t columns = 100) {
    return request_error([&] {
      plan_medusa_tree(with_paths(std::move(paths)), {6, 10, 60}, heads, columns);
    });
  };
  CHECK(
      error({{0}, {1, 0}}) ==
      "medusa_choices: path [1, 0]: expected its parent [1] among the paths, found none: they are "
      "not a tree");
  CHECK(error({{0}, {0, 0}, {0}}) ==
        "medusa_choices: path [0]: expected every path once, found it again");
  CHECK(error({{0}, {}}).find("expected paths of at least one rank") != std::string::npos);
  CHECK(error({{0}, {0, 0}, {0, 0, 0}}, 2) ==
        "medusa_choices: path [0, 0, 0]: expected at most 2 ranks, one for each head, found 3");
  CHECK(error({{0}, {-1}}).find("path [-1]: expected ranks from 0 to 63") != std::string::npos);
  CHECK(error({{0}, {5}}, 4, 5).find("expected ranks from 0 to 4, found 5") != std::string::npos);
  CHECK(error(MedusaChoices(256, {0})) == "medusa_choices: expected at most 255 paths, found 256");
  MedusaTreeOptions unknown;
  unknown.published = "mc_sim_7b";
  CHECK(request_error([&] {
          plan_medusa_tree(unknown, {6, 10, 60}, 4, 100);
        }) ==
        "medusa_choices: expected one of mc_sim_7b_63, vicuna_7b_stage1, vicuna_7b_stage1_ablation,"
        " vicuna_7b_stage2, vicuna_13b_stage1, vicuna_13b_stage2, vicuna_33b_stage1, "
        "vicuna_33b_stage2, zephyr_stage2, found 'mc_sim_7b'");
}

TEST_CASE("speculative output equals plain output") {
  for (const TreeShape tree : {TreeShape{1, 1, 1}, TreeShape{1, 3, 4}, TreeShape{6, 10, 60},
                               TreeShape{4, 10, 64}, TreeShape{4, 10, 64, 0.01}}) {
    for (const int64_t layers : {1, 2}) {
      Engine engine(medusa_options("exact", tree, {4, layers, "", 0}));
      engine.load();
      CHECK(engine.draft_method() == Method::kMedusa);
      for (const Sampling& sampling : kSamplings) {
        CAPTURE(tree.tokens);
        CAPTURE(sampling.temperature);
        const auto plain = generate(engine, kPrompt, make_request(Method::kPlain, sampling));
        CHECK(plain.size() == 60);
        CHECK(generate(engine, kPrompt, make_request(Method::kMedusa, sampling)) == plain);
        const double length = mean_accept_length(engine);
        if (tree.tokens == 1) {
          CHECK(length == 1.0);
        } else {
          CHECK(length > (sampling.temperature == 0.0f ? 1.5 : 1.0));
        }
      }
    }
  }
}

TEST_CASE("the tree that an engine tells is the one that it fills") {
  const auto shape_of = [](const EngineOptions& options) {
    const TreeShape tree = Engine(options).tree();
    return std::tuple(tree.depth, tree.topk, tree.tokens, tree.min_probability);
  };
  CHECK(shape_of(medusa_options("tree", {6, 10, 8, 0.25})) == std::tuple(3, 3, 8, 0.25));
  // A whole tree is used as it is, likely or not.
  EngineOptions options = medusa_options("tree", {6, 10, 60, 0.25});
  options.medusa_tree = with_paths({{0}, {1}, {0, 0}});
  CHECK(shape_of(options) == std::tuple(2, 2, 4, 0.0));
  Engine engine(options);
  engine.load();
  generate(engine, kPrompt, make_request(Method::kMedusa));
  CHECK(engine.last_round().tokens.size() == 4);
}

TEST_CASE("a head predicts the token that its place says") {
  // A chain: every accepted token is one head's best.
  EngineOptions options = medusa_options("chain", {6, 10, 60});
  options.medusa_tree = with_paths({{0}, {0, 0}, {0, 0, 0}, {0, 0, 0, 0}});
  Engine engine(options);
  engine.load();
  generate(engine, kPrompt, make_request(Method::kMedusa));
  const std::vector<int32_t>& lengths = engine.accept_lengths();
  CHECK(std::count(lengths.begin(), lengths.end(), 5) > 0);
  CHECK(mean_accept_length(engine) > 2.0);
}

TEST_CASE("with a sub-vocabulary") {
  size_t full_bytes = 0;
  for (const int64_t size : {0, 5, 64, 210, 211}) {
    EngineOptions options = medusa_options("sub_vocab", {4, 5, 24});
    options.ranking = test::write_tiny_ranking("medusa_ranking", kSizes.vocab);
    options.draft_vocab_size = size;
    Engine engine(options);
    engine.load();
    CHECK(engine.draft_vocab_size() == (size == 0 ? kSizes.vocab : size));
    size_t head_bytes = 0;
    for (const MemoryItem& item : engine.plan().items) {
      if (item.name == "draft head") head_bytes = item.bytes;
    }
    if (size == 0) full_bytes = head_bytes;
    if (size == 64) CHECK(head_bytes < full_bytes / 2);
    for (const Sampling& sampling : kSamplings) {
      CAPTURE(size);
      const auto plain = generate(engine, kPrompt, make_request(Method::kPlain, sampling));
      CHECK(generate(engine, kPrompt, make_request(Method::kMedusa, sampling)) == plain);
      if (size == 210) {  // nearly all tokens, in another order: as good as the full head
        CHECK(mean_accept_length(engine) > (sampling.temperature == 0.0f ? 1.5 : 1.0));
      }
    }
  }
}

TEST_CASE("prompts that continue, repeat and forget the last one") {
  Engine engine(medusa_options("reuse", {3, 4, 12}));
  engine.load();
  const Request plain = make_request(Method::kPlain, kSamplings[1]);
  const Request drafted = make_request(Method::kMedusa, kSamplings[1]);
  const auto first = generate(engine, kPrompt, plain);
  std::vector<int32_t> longer = kPrompt;
  longer.insert(longer.end(), first.begin(), first.end());
  longer.insert(longer.end(), {5, 6, 7});
  const auto continued = generate(engine, longer, plain);
  generate(engine, {9}, plain);
  CHECK(generate(engine, kPrompt, drafted) == first);
  // The drafter needs the last feature alone, so what plain decoding computed is good for it.
  CHECK(generate(engine, longer, plain) == continued);
  CHECK(generate(engine, longer, drafted) == continued);
  CHECK(engine.reused_tokens() == static_cast<int64_t>(longer.size()) - 1);
  CHECK(generate(engine, kPrompt, drafted) == first);
}

TEST_CASE("generation ends with the context, in both methods alike") {
  Engine engine(medusa_options("context", {4, 10, 64}));
  engine.load();
  Request request = make_request(Method::kPlain, kSamplings[1]);
  request.max_new_tokens = 100000;
  const auto plain = generate(engine, kPrompt, request);
  CHECK(plain.size() + kPrompt.size() == 160);
  request.method = Method::kMedusa;
  CHECK(generate(engine, kPrompt, request) == plain);
}

TEST_CASE("a planted continuation changes no text") {
  EngineOptions options = medusa_options("plant", {4, 10, 30});
  options.drafter = test::write_tiny_medusa("medusa_plant_random", kSizes);
  options.plant = true;
  options.max_context = 1200;
  Engine engine(options);
  engine.load();
  Request request = make_request(Method::kPlain);
  request.max_new_tokens = 1000;
  std::vector<int32_t> recorded = kPrompt;
  const auto plain = generate(engine, kPrompt, request);
  recorded.insert(recorded.end(), plain.begin(), plain.end());
  request.method = Method::kMedusa;
  for (const double wanted : {1.0, 2.6, 4.0}) {
    engine.plant(recorded, wanted);
    CHECK(generate(engine, kPrompt, request) == plain);
    const auto rounds = static_cast<double>(engine.accept_lengths().size());
    CHECK(999 / rounds == doctest::Approx(wanted).epsilon(0.1));
  }
}

TEST_CASE("checkpoints: whole models, claims, random weights") {
  // Names as a whole model has them, and a config that claims fewer heads than there are.
  const TreeShape tree = {4, 10, 64};
  Engine alone(medusa_options("names", tree));
  Engine whole(medusa_options("whole", tree, {4, 1, "medusa_head.", 2}));
  alone.load();
  whole.load();
  for (Engine* engine : {&alone, &whole}) generate(*engine, kPrompt, make_request(Method::kMedusa));
  CHECK(alone.accept_lengths() == whole.accept_lengths());
  CHECK(alone.last_round().tokens == whole.last_round().tokens);

  EngineOptions options = medusa_options("random", tree);
  test::FolderWriter writer("medusa_synthetic", 1);
  options.drafter = writer.finish(
      {{"medusa_num_heads", 3}, {"medusa_num_layers", 1}, {"frspec_synthetic_seed", 5}});
  Engine random(options);
  random.load();
  const auto plain = generate(random, kPrompt, make_request(Method::kPlain, kSamplings[1]));
  CHECK(generate(random, kPrompt, make_request(Method::kMedusa, kSamplings[1])) == plain);
}

TEST_CASE("heads that do not fit are refused by name") {
  const TreeShape tree = {4, 10, 24};
  const auto model_error = [&](const EngineOptions& options) -> std::string {
    try {
      Engine engine(options);
    } catch (const ModelError& error) {
      return error.what();
    }
    FAIL("expected a ModelError");
    return "";
  };
  const auto says = [](const std::string& message, const std::string& part) {
    CAPTURE(message);
    CHECK(message.find(part) != std::string::npos);
  };
  says(model_error(medusa_options("claims", tree, {3, 1, "", 5})),
       "expected medusa_num_heads heads, 5, found 3: there is no tensor 3.1.weight");

  EngineOptions options = medusa_options("sizes", tree);
  test::TinySizes other = kSizes;
  other.hidden = 48;
  options.drafter = test::write_tiny_medusa("medusa_other_hidden", other);
  says(model_error(options), "\"0.0.linear.weight\": expected shape [40, 40], found [48, 48]");
  other = kSizes;
  other.vocab = 210;
  options.drafter = test::write_tiny_medusa("medusa_other_vocab", other);
  says(model_error(options), "\"0.1.weight\": expected shape [211, 40], found [210, 40]");
  options.ranking = test::write_tiny_ranking("medusa_ranking", kSizes.vocab);
  options.draft_vocab_size = 64;
  says(model_error(options), "\"0.1.weight\": expected shape [211, 40], found [210, 40]");

  const auto with_config = [&](const nlohmann::json& config) {
    EngineOptions changed = medusa_options("config", tree);
    std::ofstream(*changed.drafter + "/config.json") << config.dump();
    return changed;
  };
  says(model_error(with_config({{"medusa_num_heads", 4}, {"medusa_num_layers", 2}})),
       "expected medusa_num_layers residual blocks in a head, 2, found 1");
  says(model_error(with_config({{"medusa_num_heads", 0}})), "medusa_num_heads");
  says(model_error(with_config({{"medusa_num_heads", 4}, {"hidden_size", 41}})),
       "hidden_size must equal the target's: expected 40, found 41");
  says(model_error(with_config({{"medusa_num_heads", 4}, {"vocab_size", 5}})),
       "vocab_size must equal the target's: expected 211, found 5");
}

TEST_CASE("methods and choices go with their drafter") {
  EngineOptions options = medusa_options("method", {4, 10, 24});
  Engine engine(options);
  engine.load();
  CHECK(request_error([&] { engine.start(kPrompt, make_request(Method::kEagle2)); }) ==
        "method 'eagle2' needs a drafter of its kind, found one for 'medusa'");
  options.medusa_tree = with_paths({{0}, {0, 0}});
  options.drafter = test::write_tiny_drafter("medusa_eagle", kSizes);
  CHECK(request_error([&] {
          Engine{options};
        }).find("medusa_choices: expected a Medusa drafter, found an EAGLE drafter") !=
        std::string::npos);
  options.drafter.reset();
  CHECK(request_error([&] { Engine{options}; }) ==
        "medusa_choices are the drafter's: they need a Medusa drafter, found none");
}

}  // namespace frspec
