// Texts, turn by turn.
#include <algorithm>
#include <chrono>

#include "bench.h"

namespace frspec::bench {
namespace {

using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

Request make_request(const Settings& settings, Method method) {
  Request request;
  request.method = method;
  request.sampling = settings.sampling;
  request.max_new_tokens = settings.new_tokens + 1;
  request.ignore_eos = true;
  return request;
}

// Writes a text, adds its times to `samples` and returns its tokens.
std::vector<int32_t> write_text(Engine& engine, const std::vector<int32_t>& prompt,
                                const Request& request, Samples& samples) {
  // A sequence that begins otherwise comes first: nothing of the prompt is kept from the last text.
  const int32_t other = prompt[0] == 0 ? 1 : 0;
  engine.start(std::span(&other, 1), request);

  std::vector<int32_t> tokens;
  const auto step = [&] {
    const auto emitted = engine.step();
    tokens.insert(tokens.end(), emitted.begin(), emitted.end());
  };
  Clock::time_point start = Clock::now();
  engine.start(prompt, request);
  while (tokens.empty()) step();
  samples.first_token.push_back(milliseconds_since(start));

  const size_t rounds_before = samples.round.size();
  double decode = 0;
  while (!engine.finished()) {
    const Timings before = engine.timings();
    start = Clock::now();
    step();
    const double round = milliseconds_since(start);
    const Timings& after = engine.timings();
    decode += round;
    samples.round.push_back(round);
    samples.draft.push_back((after.draft - before.draft) * 1e3);
    samples.verify.push_back((after.verify - before.verify) * 1e3);
    for (size_t i = 0; request.profile_drafting && i < kDraftStages; ++i) {
      samples.stages[i].push_back((after.draft_stages[i] - before.draft_stages[i]) * 1e3);
    }
  }
  const auto emitted = static_cast<int64_t>(tokens.size()) - 1;
  samples.emitted += emitted;
  samples.rounds += static_cast<int64_t>(samples.round.size() - rounds_before);
  samples.tokens_per_second.push_back(static_cast<double>(emitted) / decode * 1e3);
  const auto first = samples.verify.begin() + static_cast<std::ptrdiff_t>(rounds_before);
  samples.text_verify.push_back(quantile({first, samples.verify.end()}, 0.5));
  return tokens;
}

Run describe_engine(const Loaded& loaded, const Prompt& prompt) {
  const Engine& engine = *loaded.engine;
  Run run;
  run.configuration = loaded.configuration;
  run.method = engine.draft_method();
  run.tree = engine.tree();
  run.load_seconds = loaded.load_seconds;
  run.memory_bytes = engine.plan().total_bytes();
  run.step_bytes = engine.step_bytes();
  run.prompt_file = prompt.file;
  run.prompt_tokens = prompt.tokens.size();
  return run;
}

}  // namespace

double quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1) + 0.5)];
}

std::vector<Run> measure(const Settings& settings, const std::vector<Loaded>& engines,
                         const Prompt& prompt) {
  const Request plain = make_request(settings, Method::kPlain);
  const bool drafts = engines.front().engine->draft_method() != Method::kPlain;
  const bool profiles = drafts && settings.breakdown;
  Engine& first = *engines.front().engine;
  Samples unused;
  const std::vector<int32_t> text = write_text(first, prompt.tokens, plain, unused);
  std::vector<int32_t> recorded = prompt.tokens;
  recorded.insert(recorded.end(), text.begin(), text.end());

  std::vector<Run> runs;
  for (const Loaded& each : engines) {
    runs.push_back(describe_engine(each, prompt));
    const double accept_length = each.configuration.accept_length;
    if (accept_length > 0) each.engine->plant(recorded, accept_length);
  }
  const auto write_drafts = [&](size_t i, bool profile, Samples& samples) {
    Request request = make_request(settings, runs[i].method);
    request.profile_drafting = profile;
    const bool same = write_text(*engines[i].engine, prompt.tokens, request, samples) == text;
    runs[i].same_text = runs[i].same_text && same;
  };
  for (int turn = 0; drafts && turn < settings.warm_up; ++turn) {
    for (size_t i = 0; i < runs.size(); ++i) {
      write_drafts(i, false, unused);
      if (profiles) write_drafts(i, true, unused);
    }
  }

  Samples plain_samples;
  std::vector<double> bandwidths;
  for (int turn = 0; turn < settings.repeats; ++turn) {
    bandwidths.push_back(first.measure_bandwidth());
    write_text(first, prompt.tokens, plain, plain_samples);
    for (size_t i = 0; drafts && i < runs.size(); ++i) {
      Run& run = runs[i];
      write_drafts(i, false, run.drafted);
      const double speed = run.drafted.tokens_per_second.back();
      run.over_plain.push_back(speed / plain_samples.tokens_per_second.back());
      if (i > 0) {
        run.over_first.push_back(speed / runs.front().drafted.tokens_per_second.back());
      }
      run.verify_over_plain.push_back(run.drafted.text_verify.back() /
                                      plain_samples.text_verify.back());
    }
    // Apart from the timed texts: on a GPU the stamps take time.
    for (size_t i = 0; profiles && i < runs.size(); ++i) {
      write_drafts(i, true, runs[i].profiled);
    }
  }
  for (Run& run : runs) {
    run.plain = plain_samples;
    run.bandwidth = quantile(bandwidths, 0.5);
  }
  return runs;
}

}  // namespace frspec::bench
