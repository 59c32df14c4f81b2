// The configuration and where it starts from.
#include <charconv>
#include <cstdlib>
#include <string>

#include "emulation_config.h"

namespace emulation {
namespace {

[[noreturn]] void refuse(const char* variable, const char* expected, const std::string& found) {
  throw Error(std::string(variable) + ": expected " + expected + ", found '" + found + "'");
}

uint64_t parse_number(const char* variable, const std::string& text, const std::string& whole) {
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) {
    refuse(variable, "a number", whole);
  }
  return number;
}

std::string environment(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr ? "" : value;
}

template <typename T>
void read_number(const char* variable, T& setting) {
  const std::string text = environment(variable);
  if (!text.empty()) setting = static_cast<T>(parse_number(variable, text, text));
}

void read_order(Config& config) {
  const char* variable = "FRSPEC_EMULATION_ORDER";
  const std::string text = environment(variable);
  if (text.empty() || text == "forward") return;
  if (text == "reverse") {
    config.order = Order::kReverse;
  } else if (text.rfind("random:", 0) == 0) {
    config.order = Order::kRandom;
    config.seed = parse_number(variable, text.substr(7), text);
  } else {
    refuse(variable, "forward, reverse or random:SEED", text);
  }
}

// Whether the variable has the second of its two values, the first being the default.
bool read_choice(const char* variable, const char* first, const char* second) {
  const std::string text = environment(variable);
  if (text == second) return true;
  if (!text.empty() && text != first) {
    refuse(variable, (std::string(first) + " or " + second).c_str(), text);
  }
  return false;
}

void read_modes(Config& config) {
  const char* variable = "FRSPEC_EMULATION_COPIES";
  const std::string copies = environment(variable);
  if (copies == "defer") {
    config.copies = Copies::kDefer;
  } else if (copies == "eager") {
    config.copies = Copies::kEager;
  } else if (!copies.empty() && copies != "poison") {
    refuse(variable, "poison, defer or eager", copies);
  }
  if (read_choice("FRSPEC_EMULATION_STREAMS", "lazy", "immediate")) {
    config.streams = Streams::kImmediate;
  }
  if (read_choice("FRSPEC_EMULATION_ERRORS", "throw", "sticky")) {
    config.kernel_errors = KernelErrors::kSticky;
  }
  if (read_choice("FRSPEC_EMULATION_PROTECT", "on", "off")) config.protect_memory = false;
  if (read_choice("FRSPEC_EMULATION_HOPPER", "off", "on")) config.hopper = true;
}

void read_compute(Config& config) {
  const char* variable = "FRSPEC_EMULATION_COMPUTE";
  const std::string text = environment(variable);
  if (text.empty()) return;
  const size_t point = text.find('.');
  if (point == std::string::npos) refuse(variable, "MAJOR.MINOR", text);
  config.compute_major = static_cast<int>(parse_number(variable, text.substr(0, point), text));
  config.compute_minor = static_cast<int>(parse_number(variable, text.substr(point + 1), text));
  size_t kibibytes = 100;  // 8.6, 8.9 and 12
  if (config.compute_major == 8 && config.compute_minor == 0) kibibytes = 164;
  if (config.compute_major == 9 || config.compute_major == 10) kibibytes = 228;
  config.shared_bytes_per_multiprocessor = kibibytes << 10;
  config.shared_bytes_per_block = (kibibytes - 1) << 10;
}

void read_failure() {
  const char* variable = "FRSPEC_EMULATION_FAIL";
  const std::string text = environment(variable);
  if (text.empty()) return;
  const size_t first = text.find(':');
  if (first == std::string::npos) refuse(variable, "CALL:ERROR or CALL:ERROR:AFTER", text);
  const size_t second = text.find(':', first + 1);
  const uint64_t error = parse_number(
      variable, text.substr(first + 1, second == std::string::npos ? second : second - first - 1),
      text);
  const uint64_t after =
      second == std::string::npos ? 0 : parse_number(variable, text.substr(second + 1), text);
  fail_next(text.substr(0, first).c_str(), static_cast<cudaError_t>(error),
            static_cast<int>(after));
}

Config from_environment() {
  Config config;
  read_order(config);
  read_modes(config);
  read_compute(config);
  read_number("FRSPEC_EMULATION_THREADS", config.threads);
  read_number("FRSPEC_EMULATION_DEVICES", config.device_count);
  read_number("FRSPEC_EMULATION_DRIVER", config.driver_version);
  read_number("FRSPEC_EMULATION_DEVICE_BYTES", config.device_bytes);
  read_failure();
  if (config.threads < 1) refuse("FRSPEC_EMULATION_THREADS", "at least 1", "0");
  return config;
}

}  // namespace

Config& config() {
  static Config current = from_environment();
  return current;
}

Statistics& statistics() {
  static Statistics counters;
  return counters;
}

}  // namespace emulation
