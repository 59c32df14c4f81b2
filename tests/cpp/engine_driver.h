// Requests to an engine, run to their ends.
#pragma once

#include <cstdint>
#include <vector>

#include "engine.h"

namespace frspec::test {

inline Request make_request(Method method, const Sampling& sampling = {},
                            int64_t max_new_tokens = 60) {
  Request request;
  request.method = method;
  request.sampling = sampling;
  request.max_new_tokens = max_new_tokens;
  request.ignore_eos = true;
  return request;
}

inline std::vector<int32_t> generate(Engine& engine, const std::vector<int32_t>& prompt,
                                     const Request& request) {
  std::vector<int32_t> tokens;
  engine.start(prompt, request);
  while (!engine.finished()) {
    const auto step = engine.step();
    tokens.insert(tokens.end(), step.begin(), step.end());
  }
  return tokens;
}

}  // namespace frspec::test
