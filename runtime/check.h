// Typed errors. Every failure of the library is one of these exceptions; its message names what was
// expected and what was found, in one line. The bindings translate them to the Python classes of
// the same name in frspec.errors. Nothing in the library exits or aborts.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace frspec {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A model or drafter folder cannot be used: file, tensor, shape, dtype or config.
class ModelError : public Error {
 public:
  using Error::Error;
};

// A ranking file cannot be used with this model.
class RankingError : public Error {
 public:
  using Error::Error;
};

// A request cannot be served: prompt, token ids, sampling values or options.
class RequestError : public Error {
 public:
  using Error::Error;
};

// The memory plan does not fit.
class MemoryPlanError : public Error {
 public:
  using Error::Error;
};

// A device is absent or failed.
class DeviceError : public Error {
 public:
  using Error::Error;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace frspec

// FRSPEC_CHECK(n > 0, RequestError, "max_new_tokens must be positive, found ", n)
#define FRSPEC_CHECK(condition, ErrorType, ...)                       \
  do {                                                                \
    if (!(condition)) throw ErrorType(::frspec::concat(__VA_ARGS__)); \
  } while (0)
