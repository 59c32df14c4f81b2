// The engine end to end on the CUDA backend and a tiny random model: speculative text is the text
// that the target writes alone, and the logits agree with the CPU backend's.
#include <algorithm>

#include "cuda_test_support.h"
#include "engine.h"
#include "engine_driver.h"
#include "tiny_model.h"

namespace frspec::cuda {
namespace {

using test::generate;

// Sizes that are no multiples of tiles, grouped query heads, and the tree's 65th node.
constexpr test::TinySizes kSizes{211, 72, 136, 2, 6, 2, 24};

const std::vector<int32_t> kPrompt = {3, 14, 15, 92, 65, 35, 89, 79};

EngineOptions tiny_options(const std::string& name, TreeShape tree, const char* dtype = "bf16") {
  EngineOptions options;
  options.model = test::write_predictable_target("cuda_" + name + "_target", kSizes);
  options.drafter = test::write_predictable_drafter("cuda_" + name + "_drafter", kSizes);
  options.device = "cuda";
  options.dtype = dtype;
  options.max_context = 200;
  options.threads = 2;
  options.tree = tree;
  return options;
}

const Sampling kDrawn{1.0f, 0, 1.0f, 0.0f, 42};
const Sampling kFiltered{0.8f, 20, 0.9f, 0.01f, 7};
const Sampling kSamplings[] = {{}, kDrawn, kFiltered};

#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kNewTokens = 24;  // each takes ten times as long
#else
constexpr int64_t kNewTokens = 40;
#endif

Request make_request(Method method, const Sampling& sampling, int64_t max_new_tokens = kNewTokens) {
  return test::make_request(method, sampling, max_new_tokens);
}

}  // namespace

TEST_CASE("speculative output equals plain output") {
  struct Case {
    TreeShape tree;
    const char* dtype;
  };
  for (const Case& each : {Case{{1, 1, 2}, "bf16"},
                           {{3, 4, 12}, "bf16"},
                           {{3, 4, 12}, "fp16"},
                           {{6, 10, 65}, "bf16"}}) {
    CAPTURE(each.tree.tokens);
    Engine engine(tiny_options("exact", each.tree, each.dtype));
    engine.load();
    for (const Sampling& sampling : kSamplings) {
      CAPTURE(sampling.temperature);
      const auto plain = generate(engine, kPrompt, make_request(Method::kPlain, sampling));
      const auto drafted = generate(engine, kPrompt, make_request(Method::kEagle2, sampling));
      CHECK(plain.size() == kNewTokens);
      CHECK(plain == drafted);
      const std::vector<int32_t>& lengths = engine.accept_lengths();
      CHECK(*std::max_element(lengths.begin(), lengths.end()) > 1);
    }
  }
}

TEST_CASE("trees have one shape") {
  CHECK_THROWS_WITH_AS(Engine(tiny_options("shape", {4, 4, 8, 0.06})),
                       doctest::Contains("min_probability must be 0 on cuda:0"), RequestError);
}

TEST_CASE("with a sub-vocabulary, too") {
  for (const int64_t size : {5, 64}) {
    EngineOptions options = tiny_options("sub_vocab", {4, 5, 24});
    options.ranking = test::write_tiny_ranking("cuda_sub_vocab_ranking", kSizes.vocab);
    options.draft_vocab_size = size;
    Engine engine(options);
    engine.load();
    CHECK(engine.draft_vocab_size() == size);
    for (const Sampling& sampling : kSamplings) {
      const auto plain = generate(engine, kPrompt, make_request(Method::kPlain, sampling, 16));
      CHECK(generate(engine, kPrompt, make_request(Method::kEagle2, sampling, 16)) == plain);
    }
  }
}

TEST_CASE("Medusa writes what plain decoding writes, too") {
  struct Case {
    TreeShape tree;
    const char* dtype;
    int64_t layers;
    int64_t vocab_size;
  };
  for (const Case& each : {Case{{1, 1, 1}, "bf16", 1, 0},
                           {{6, 10, 64}, "bf16", 1, 0},
                           {{4, 10, 30}, "fp16", 2, 0},
                           {{4, 10, 16}, "bf16", 1, 5}}) {
    CAPTURE(each.tree.tokens);
    CAPTURE(each.vocab_size);
    EngineOptions options = tiny_options("medusa", each.tree, each.dtype);
    options.drafter =
        test::write_predictable_medusa("cuda_medusa_heads", kSizes, {4, each.layers, "", 0});
    options.ranking = test::write_tiny_ranking("cuda_medusa_ranking", kSizes.vocab);
    options.draft_vocab_size = each.vocab_size;
    Engine engine(options);
    engine.load();
    for (const Sampling& sampling : kSamplings) {
      CAPTURE(sampling.temperature);
      const auto plain = generate(engine, kPrompt, make_request(Method::kPlain, sampling, 16));
      CHECK(plain.size() == 16);
      CHECK(generate(engine, kPrompt, make_request(Method::kMedusa, sampling, 16)) == plain);
      const std::vector<int32_t>& lengths = engine.accept_lengths();
      if (each.tree.tokens > 1 && each.vocab_size == 0) {
        CHECK(*std::max_element(lengths.begin(), lengths.end()) > 1);
      }
    }
  }
}

// Both kinds of rounds are recorded and replayed beside each other.
TEST_CASE("the stages of drafting are timed when asked for, and change no text") {
  for (const Method method : {Method::kEagle2, Method::kMedusa}) {
    CAPTURE(method_name(method));
    EngineOptions options = tiny_options("stages", {3, 4, 12});
    if (method == Method::kMedusa) {
      options.drafter = test::write_predictable_medusa("cuda_stages_heads", kSizes);
    }
    Engine engine(options);
    engine.load();
    const auto text = generate(engine, kPrompt, make_request(Method::kPlain, {}, 24));
    for (int turn = 0; turn < 2; ++turn) {
      Request request = make_request(method, {}, 24);
      CHECK(generate(engine, kPrompt, request) == text);
      for (const double seconds : engine.timings().draft_stages) CHECK(seconds == 0);
      request.profile_drafting = true;
      CHECK(generate(engine, kPrompt, request) == text);
      CHECK(engine.accept_lengths().size() >= 3);
      double sum = 0;
      for (size_t stage = 0; stage < kDraftStages; ++stage) {
        CAPTURE(stage);
        const double seconds = engine.timings().draft_stages[stage];
        const bool none = method == Method::kMedusa && stage == size_t{0};  // no embedding
        CHECK((seconds > 0) == !none);
        sum += seconds;
      }
      // Each interval is rounded to half a microsecond; levels have at most five.
      const double intervals = 20.0 * static_cast<double>(engine.accept_lengths().size());
      CHECK(sum <= engine.timings().draft * (1 + 1e-4) + intervals * 0.5e-6);
    }
  }
}

TEST_CASE("marks that are switched off record no event") {
  const std::unique_ptr<Backend> backend = make_backend("cuda", 1);
  StageMarks off;
  off.begin(*backend);
  off.mark(DraftStage::kHead);
  StageSeconds seconds{};
  off.add_seconds(seconds);
  CHECK(seconds == StageSeconds{});
  CHECK_THROWS_WITH_AS(backend->seconds_between(0, 1), doctest::Contains("not both are marked"),
                       Error);
  StageMarks on(0);
  on.begin(*backend);
  on.mark(DraftStage::kHead);
  on.mark(DraftStage::kHead);
  backend->synchronize();
  on.add_seconds(seconds);
  CHECK(seconds[static_cast<size_t>(DraftStage::kHead)] ==
        doctest::Approx(backend->seconds_between(0, 2)).epsilon(0.1));
  StageMarks last(Backend::kMarks - 1);
  last.begin(*backend);
  CHECK_THROWS_WITH_AS(last.mark(DraftStage::kTree), doctest::Contains("there are 168"), Error);
}

TEST_CASE("Medusa drafts the CPU's trees") {
  EngineOptions options = tiny_options("medusa_cpu", {4, 4, 20}, "fp16");
  options.drafter = test::write_predictable_medusa("cuda_medusa_cpu_heads", kSizes, {4, 2, "", 0});
  Engine engine(options);
  engine.load();
  options.device = "cpu";
  Engine reference(options);
  reference.load();
  const Request request = make_request(Method::kMedusa, {}, 20);
  engine.start(kPrompt, request);
  reference.start(kPrompt, request);
  int64_t nodes = 0;
  int64_t same = 0;
  while (!engine.finished()) {  // both backends round differently: a few candidates change places
    const auto tokens = engine.step();
    const auto want = reference.step();
    if (!std::equal(tokens.begin(), tokens.end(), want.begin(), want.end())) break;
    const auto tree = engine.last_round();
    const auto want_tree = reference.last_round();
    CHECK(tree.parents == want_tree.parents);
    for (size_t i = 0; i < tree.tokens.size(); ++i) {
      ++nodes;
      same += tree.tokens[i] == want_tree.tokens[i] ? 1 : 0;
    }
  }
  CHECK(nodes >= 40);
  CHECK(same > nodes * 9 / 10);
}

TEST_CASE("speculative output equals plain output where products have several parts") {
  // 512 values of k are two parts of a matrix with few rows: of o, down and fc, which norms and the
  // drafter's layer read, and of qkv, which RoPE reads.
  for (const test::TinySizes& sizes :
       {test::TinySizes{211, 384, 528, 1, 8, 2, 64}, test::TinySizes{211, 512, 72, 1, 2, 1, 64}}) {
    EngineOptions options = tiny_options("wide", {2, 3, 7});
    options.model = test::write_predictable_target("cuda_wide_target", sizes);
    options.drafter = test::write_predictable_drafter("cuda_wide_drafter", sizes);
    Engine engine(options);
    engine.load();
    for (const Sampling& sampling : {Sampling{}, kDrawn}) {
      const auto plain = generate(engine, kPrompt, make_request(Method::kPlain, sampling, 8));
      const auto drafted = generate(engine, kPrompt, make_request(Method::kEagle2, sampling, 8));
      CHECK(plain.size() == 8);
      CHECK(plain == drafted);
    }
  }
}

// The same text, whether its beginning was decoded, drafted or part of a prompt: keys and values
// are a function of the tokens.
TEST_CASE("requests in a row, each as if nothing came before") {
  Engine engine(tiny_options("row", {3, 4, 12}));
  engine.load();
  const Request plain = make_request(Method::kPlain, kDrawn, 12);
  const Request drafted = make_request(Method::kEagle2, kDrawn, 12);
  const auto first = generate(engine, kPrompt, plain);
  std::vector<int32_t> longer = kPrompt;
  longer.insert(longer.end(), first.begin(), first.end());
  longer.insert(longer.end(), {5, 6, 7});
  const auto continued = generate(engine, longer, plain);
  generate(engine, {9}, plain);  // forgets the sequence
  CHECK(generate(engine, longer, drafted) == continued);
  CHECK(generate(engine, kPrompt, drafted) == first);
  CHECK(generate(engine, longer, drafted) == continued);
  CHECK(generate(engine, longer, plain) == continued);
}

TEST_CASE("whole chunks of a long prompt are kept, and change nothing") {
  EngineOptions options = tiny_options("chunks", {3, 4, 12});
  options.max_context = 700;
  Engine engine(options);
  engine.load();
  std::vector<int32_t> prompt;
  for (int32_t i = 0; i < 600; ++i) prompt.push_back((i * 37 + 5) % 211);
  const Request plain = make_request(Method::kPlain, kDrawn, 8);
  const Request drafted = make_request(Method::kEagle2, kDrawn, 8);
  const auto text = generate(engine, prompt, plain);
  CHECK(engine.reused_tokens() == 0);
  CHECK(generate(engine, prompt, plain) == text);
  CHECK(engine.reused_tokens() == 512);
  CHECK(generate(engine, prompt, drafted) == text);
  CHECK(engine.reused_tokens() == 0);  // the drafter had not seen it
  CHECK(generate(engine, prompt, drafted) == text);
  CHECK(engine.reused_tokens() == 512);
}

// Both backends round differently, so that texts may part at near-ties; the logits after the same
// tokens stay close.
TEST_CASE("logits agree with the CPU backend's") {
  for (const char* dtype : {"bf16", "fp16"}) {
    EngineOptions options = tiny_options("cpu", {3, 4, 12}, dtype);
    Engine engine(options);
    engine.load();
    options.device = "cpu";
    Engine reference(options);
    reference.load();
    for (const int64_t length : {1, 40, 64, 65, 150}) {
      CAPTURE(length);
      std::vector<int32_t> prompt;
      for (int32_t i = 0; i < length; ++i) prompt.push_back((i * 37 + 5) % 211);
      const Request request = make_request(Method::kPlain, {}, 3);
      engine.start(prompt, request);
      reference.start(prompt, request);
      for (int step = 0; step < 3; ++step) {
        const auto tokens = engine.step();
        const auto want = reference.step();
        const auto logits = engine.last_round().logits;
        const auto want_logits = reference.last_round().logits;
        REQUIRE(logits.size() == want_logits.size());
        double difference = 0;
        double size = 0;
        for (size_t i = 0; i < logits.size(); ++i) {
          const double error = double{logits[i]} - want_logits[i];
          difference += error * error;
          size += double{want_logits[i]} * want_logits[i];
        }
        CHECK(std::sqrt(difference / size) < 0.03);
        if (!std::equal(tokens.begin(), tokens.end(), want.begin(), want.end())) break;
      }
    }
  }
}

TEST_CASE("generation ends with the context, in both methods alike") {
  Engine engine(tiny_options("context", {4, 4, 20}));
  engine.load();
  Request request = make_request(Method::kPlain, kDrawn, 100000);
  std::vector<int32_t> prompt;
  for (int32_t i = 0; i < 170; ++i) prompt.push_back((i * 37 + 5) % 211);
  const auto plain = generate(engine, prompt, request);
  CHECK(plain.size() + prompt.size() == 200);
  request.method = Method::kEagle2;
  CHECK(generate(engine, prompt, request) == plain);
}

TEST_CASE("what CUDA has no kernels for is refused before anything is loaded") {
  EngineOptions options = tiny_options("refused", {1, 1, 2});
  options.dtype = "fp32";
  CHECK_THROWS_WITH_AS(Engine{options}, doctest::Contains("bf16 or fp16, found fp32"), ModelError);
  test::TinySizes odd = kSizes;
  odd.hidden = 36;
  options = tiny_options("odd", {1, 1, 2});
  options.model = test::write_tiny_target("cuda_odd_target", odd);
  options.drafter.reset();
  CHECK_THROWS_WITH_AS(Engine{options}, doctest::Contains("multiples of 8"), ModelError);
}

}  // namespace frspec::cuda
