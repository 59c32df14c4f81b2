// The engine end to end on a tiny random model: identity of speculative and plain output, the
// memory plan, reuse of the KV cache, and that a steady step allocates nothing.
#include <doctest/doctest.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <set>
#include <tuple>
#include <utility>

#include "engine.h"
#include "engine_driver.h"
#include "tiny_model.h"

namespace {

std::atomic<int64_t> allocation_count{0};

}  // namespace

// Counts every allocation of the test program. GCC sees the inlined free() of memory from a
// replaced operator new and takes the pair for a mistake.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  ++allocation_count;
  return std::malloc(size);
}
void* operator new(size_t size) {
  if (void* memory = operator new(size, std::nothrow)) return memory;
  throw std::bad_alloc();
}
void* operator new[](size_t size) { return operator new(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }

namespace frspec {
namespace {

using test::generate;

EngineOptions tiny_options(const std::string& name, TreeShape tree) {
  EngineOptions options;
  options.model = test::write_tiny_target(name + "_target");
  options.drafter = test::write_tiny_drafter(name + "_drafter");
  options.device = "cpu";
  options.max_context = 160;
  options.threads = 2;
  options.tree = tree;
  return options;
}

const std::vector<int32_t> kPrompt = {3, 14, 15, 92, 65, 35, 89, 79};

Request make_request(Method method, float temperature) {
  return test::make_request(method, {.temperature = temperature, .seed = 42});
}

TEST_CASE("speculative output equals plain output") {
  for (const TreeShape tree :
       {TreeShape{1, 1, 2}, TreeShape{3, 4, 12}, TreeShape{6, 10, 60}, TreeShape{5, 16, 256},
        TreeShape{4, 4, 8, 0.06}, TreeShape{6, 10, 60, 0.001}}) {
    Engine engine(tiny_options("exact", tree));
    engine.load();
    for (const float temperature : {0.0f, 1.0f}) {
      CAPTURE(tree.tokens);
      CAPTURE(temperature);
      const auto plain = generate(engine, kPrompt, make_request(Method::kPlain, temperature));
      const auto drafted = generate(engine, kPrompt, make_request(Method::kEagle2, temperature));
      CHECK(plain.size() == 60);
      CHECK(plain == drafted);
    }
  }
}

TEST_CASE("the tree that an engine tells is the one that it fills") {
  const auto shape_of = [](TreeShape asked) {
    const TreeShape tree = Engine(tiny_options("shape", asked)).tree();
    return std::tuple(tree.depth, tree.topk, tree.tokens, tree.min_probability);
  };
  CHECK(shape_of({4, 4, 6, 0.08}) == std::tuple(4, 4, 6, 0.08));
  CHECK(shape_of({1, 4, 256, 0.0}) == std::tuple(1, 4, 5, 0.0));
}

TEST_CASE("generation ends with the context, in both methods alike") {
  Engine engine(tiny_options("context", {4, 4, 20}));
  engine.load();
  Request request = make_request(Method::kPlain, 1.0f);
  request.max_new_tokens = 100000;
  const auto plain = generate(engine, kPrompt, request);
  CHECK(engine.finish_reason() == FinishReason::kLength);
  CHECK(plain.size() + kPrompt.size() == 160);
  request.method = Method::kEagle2;
  CHECK(generate(engine, kPrompt, request) == plain);
}

TEST_CASE("a prompt that continues the previous sequence reuses its KV cache") {
  Engine engine(tiny_options("reuse", {3, 3, 8}));
  engine.load();
  for (const Method method : {Method::kPlain, Method::kEagle2}) {
    const Request request = make_request(method, 0.0f);
    const auto first = generate(engine, kPrompt, request);
    std::vector<int32_t> longer = kPrompt;
    longer.insert(longer.end(), first.begin(), first.end());
    longer.insert(longer.end(), {5, 6, 7});
    const auto continued = generate(engine, longer, request);
    CHECK(engine.reused_tokens() >= static_cast<int64_t>(kPrompt.size() + first.size()) - 8);
    generate(engine, {9}, request);  // forgets the sequence
    CHECK(generate(engine, longer, request) == continued);
    CHECK(engine.reused_tokens() == 0);
  }
}

TEST_CASE("a steady step allocates nothing") {
  const TreeShape fixed{3, 4, 12};
  const TreeShape likely{3, 4, 12, 0.02};
  for (const auto& [drafted, tree] :
       {std::pair{Method::kEagle2, fixed}, std::pair{Method::kMedusa, fixed},
        std::pair{Method::kEagle2, likely}, std::pair{Method::kMedusa, likely}}) {
    EngineOptions options = tiny_options("allocation", tree);
    if (drafted == Method::kMedusa) options.drafter = test::write_tiny_medusa("allocation_medusa");
    Engine engine(options);
    engine.load();
    for (const float temperature : {0.0f, 1.0f}) {
      for (const Method method : {Method::kPlain, drafted}) {
        Request request = make_request(method, temperature);
        request.profile_drafting = true;
        request.sampling.top_k = temperature > 0.0f ? 50 : 0;
        request.sampling.top_p = temperature > 0.0f ? 0.9f : 1.0f;
        engine.start(kPrompt, request);
        const int64_t before = allocation_count.load();
        while (!engine.finished()) engine.step();
        CHECK(allocation_count.load() == before);
      }
    }
  }
}

TEST_CASE("the memory plan") {
  EngineOptions options = tiny_options("plan", {3, 4, 12});
  Engine engine(options);
  const size_t total = engine.plan().total_bytes();
  CHECK(total > 0);

  options.memory_limit = total - 1;
  Engine limited(options);
  try {
    limited.load();
    FAIL("a plan above the limit was loaded");
  } catch (const MemoryPlanError& error) {
    const std::string message = error.what();
    CHECK(message.find(std::to_string(total)) != std::string::npos);
    const size_t at = message.find("a max_context of ");
    REQUIRE(at != std::string::npos);
    options.max_context = std::stoll(message.substr(at + 17));
    CHECK(options.max_context < 160);
  }
  Engine fitting(options);
  fitting.load();
  CHECK(generate(fitting, {1, 2, 3}, make_request(Method::kEagle2, 0.0f)).size() == 60);
}

TEST_CASE("a planted continuation is accepted at the wanted length, and changes no text") {
  EngineOptions options = tiny_options("plant", {6, 4, 30});
  options.plant = true;
  options.max_context = 1200;
  Engine engine(options);
  engine.load();
  Request request = make_request(Method::kPlain, 0.0f);
  request.max_new_tokens = 1000;
  std::vector<int32_t> recorded = kPrompt;
  const auto plain = generate(engine, kPrompt, request);
  recorded.insert(recorded.end(), plain.begin(), plain.end());
  request.method = Method::kEagle2;
  for (const double wanted : {1.0, 2.6, 3.89, 7.0}) {
    engine.plant(recorded, wanted);
    CHECK(generate(engine, kPrompt, request) == plain);
    const auto rounds = static_cast<double>(engine.accept_lengths().size());
    CHECK(999 / rounds == doctest::Approx(wanted).epsilon(0.1));
  }
  engine.plant({}, 1.0);
  CHECK(generate(engine, kPrompt, request) == plain);
  CHECK_THROWS_AS(engine.plant(recorded, 7.5), RequestError);
}

TEST_CASE("a folder may ask for random weights") {
  const std::string target = test::write_synthetic("synthetic_target", {}, 2);
  const std::string drafter = test::write_synthetic("synthetic_drafter", {}, 1);
  EngineOptions options;
  options.model = target;
  options.drafter = drafter;
  options.device = "cpu";
  options.max_context = 160;
  options.tree = {3, 4, 12};
  Engine engine(options);
  CHECK(engine.dtype() == DType::kBF16);
  engine.load();
  const auto plain = generate(engine, kPrompt, make_request(Method::kPlain, 1.0f));
  CHECK(std::set<int32_t>(plain.begin(), plain.end()).size() > 20);
  CHECK(generate(engine, kPrompt, make_request(Method::kEagle2, 1.0f)) == plain);
}

TEST_CASE("sizes without a kernel are refused before anything is loaded") {
  test::TinySizes sizes;
  sizes.head_dim = 264;
  EngineOptions options;
  options.model = test::write_tiny_target("wide_heads", sizes);
  options.device = "cpu";
  CHECK_THROWS_WITH_AS(Engine{options}, doctest::Contains("a multiple of 8 up to 256, found 264"),
                       ModelError);
}

TEST_CASE("a refused request leaves the engine usable") {
  Engine engine(tiny_options("refused", {3, 4, 12}));
  engine.load();
  const Request request = make_request(Method::kEagle2, 0.0f);
  const auto expected = generate(engine, kPrompt, request);
  CHECK_THROWS_AS(engine.start({}, request), RequestError);
  CHECK_THROWS_AS(engine.start(std::vector<int32_t>{211}, request), RequestError);
  CHECK_THROWS_AS(engine.start(std::vector<int32_t>{-1}, request), RequestError);
  CHECK_THROWS_AS(engine.start(std::vector<int32_t>(160, 1), request), RequestError);
  Request nonsense = request;
  nonsense.sampling.temperature = -1.0f;
  CHECK_THROWS_AS(engine.start(kPrompt, nonsense), RequestError);
  nonsense = request;
  nonsense.sampling.top_p = std::nanf("");
  CHECK_THROWS_AS(engine.start(kPrompt, nonsense), RequestError);
  CHECK(generate(engine, kPrompt, request) == expected);
}

}  // namespace
}  // namespace frspec
