// The stages of drafting: timed when a request asks for them, and nothing else is changed by it.
#include <doctest/doctest.h>

#include <numeric>

#include "engine.h"
#include "engine_driver.h"
#include "tiny_model.h"

namespace frspec {
namespace {

using test::generate;
using test::make_request;

// Large enough that a stage takes longer than looking at the clock.
constexpr test::TinySizes kSizes{2003, 192, 320, 2, 6, 2, 32};
const std::vector<int32_t> kPrompt = {3, 14, 15, 92, 65, 35, 89, 79};

double sum(const StageSeconds& stages) {
  return std::accumulate(stages.begin(), stages.end(), 0.0);
}

double seconds_of(const Engine& engine, DraftStage stage) {
  return engine.timings().draft_stages[static_cast<size_t>(stage)];
}

EngineOptions options_for(const std::string& drafter, TreeShape tree) {
  EngineOptions options;
  options.model = test::write_synthetic("stages_target", kSizes, kSizes.layers);
  options.drafter = drafter;
  options.device = "cpu";
  options.max_context = 160;
  options.threads = 2;
  options.tree = tree;
  return options;
}

void check_stages(Engine& engine, bool embeds) {
  const Request plain = make_request(Method::kPlain);
  const Request drafted = make_request(engine.draft_method());
  Request profiled = drafted;
  profiled.profile_drafting = true;
  const auto text = generate(engine, kPrompt, plain);
  // Turn by turn, so that neither leaves anything behind for the other.
  for (int turn = 0; turn < 2; ++turn) {
    CHECK(generate(engine, kPrompt, drafted) == text);
    CHECK(engine.timings().draft > 0);
    CHECK(sum(engine.timings().draft_stages) == 0);
    const std::vector<int32_t> lengths = engine.accept_lengths();

    CHECK(generate(engine, kPrompt, profiled) == text);
    CHECK(engine.accept_lengths() == lengths);
    CHECK((seconds_of(engine, DraftStage::kEmbedding) > 0) == embeds);
    for (const DraftStage stage :
         {DraftStage::kLayers, DraftStage::kHead, DraftStage::kTopk, DraftStage::kTree}) {
      CHECK(seconds_of(engine, stage) > 0);
    }
    CHECK(sum(engine.timings().draft_stages) <= engine.timings().draft);
    CHECK(sum(engine.timings().draft_stages) >= 0.8 * engine.timings().draft);
  }
  Request profiled_plain = plain;
  profiled_plain.profile_drafting = true;
  CHECK(generate(engine, kPrompt, profiled_plain) == text);
  CHECK(sum(engine.timings().draft_stages) == 0);
}

}  // namespace

TEST_CASE("the stages of EAGLE's drafting") {
  const std::string drafter = test::write_synthetic("stages_drafter", kSizes, 1);
  for (const TreeShape tree :
       {TreeShape{1, 3, 4}, TreeShape{6, 10, 60}, TreeShape{kMaxTreeDepth, 2, 40},
        TreeShape{kMaxTreeDepth, 2, 40, 0.001}}) {
    CAPTURE(tree.depth);
    Engine engine(options_for(drafter, tree));
    engine.load();
    check_stages(engine, true);
  }
}

TEST_CASE("the stages of Medusa's drafting") {
  const std::string drafter = test::write_tiny_medusa("stages_medusa", kSizes);
  for (const TreeShape tree : {TreeShape{4, 10, 30}, TreeShape{4, 10, 30, 0.001}}) {
    Engine engine(options_for(drafter, tree));
    engine.load();
    check_stages(engine, false);
  }
}

}  // namespace frspec
