#include "json_file.h"

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <system_error>
#include <unordered_set>
#include <vector>

#include "check.h"

namespace frspec {

using nlohmann::json;

namespace {

constexpr size_t kMaxNesting = 32;
constexpr size_t kMaxQuoted = 120;

}  // namespace

json parse_json(std::string_view text, const std::string& where) {
  // The parser takes a NUL for the end of its input and would not look at what follows.
  const size_t nul = text.find('\0');
  FRSPEC_CHECK(nul == std::string_view::npos, ModelError, where,
               ": expected JSON, found a NUL byte", " at byte ", nul);
  size_t nesting = 0;
  std::vector<std::unordered_set<std::string>> keys;
  const json::parser_callback_t check = [&](int, json::parse_event_t event, json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start:
        keys.emplace_back();
        [[fallthrough]];
      case json::parse_event_t::array_start:
        ++nesting;
        FRSPEC_CHECK(nesting <= kMaxNesting, ModelError, where, ": expected JSON nested at most ",
                     kMaxNesting, " deep, found more");
        break;
      case json::parse_event_t::object_end:
        keys.pop_back();
        [[fallthrough]];
      case json::parse_event_t::array_end:
        --nesting;
        break;
      case json::parse_event_t::key: {
        const auto& key = parsed.get_ref<const std::string&>();
        FRSPEC_CHECK(keys.back().insert(key).second, ModelError, where,
                     ": expected every key once, found ", quote(key), " twice");
        break;
      }
      case json::parse_event_t::value:
        break;
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), check);
  } catch (const json::parse_error& error) {
    FRSPEC_CHECK(error.byte <= text.size(), ModelError, where,
                 ": expected complete JSON, found its end at byte ", text.size(), " (truncated?)");
    throw ModelError(
        concat(where, ": expected JSON, found an error at byte ", error.byte, " of ", text.size()));
  } catch (const json::exception&) {
    throw ModelError(concat(where, ": expected JSON, found a number out of range"));
  }
}

json read_json_object(const std::string& path, size_t max_bytes) {
  std::error_code failure;
  const auto status = std::filesystem::status(path, failure);
  FRSPEC_CHECK(std::filesystem::exists(status), ModelError, path, ": expected a file, found none");
  FRSPEC_CHECK(std::filesystem::is_regular_file(status), ModelError, path,
               ": expected a regular file, found something else");
  const auto size = std::filesystem::file_size(path, failure);
  FRSPEC_CHECK(!failure, ModelError, path, ": cannot be read: ", failure.message());
  FRSPEC_CHECK(size <= max_bytes, ModelError, path, ": expected at most ", max_bytes,
               " bytes of JSON, found ", size);
  std::string text(size, '\0');
  std::ifstream file(path, std::ios::binary);
  FRSPEC_CHECK(file.good(), ModelError, path, ": cannot be opened for reading");
  file.read(text.data(), static_cast<std::streamsize>(size));
  FRSPEC_CHECK(static_cast<uintmax_t>(file.gcount()) == size, ModelError, path, ": expected ", size,
               " bytes, could read ", file.gcount());
  json value = parse_json(text, path);
  FRSPEC_CHECK(value.is_object(), ModelError, path, ": expected a JSON object, found ",
               describe(value));
  return value;
}

std::string quote(const std::string& text) {
  // The parser lets no invalid UTF-8 through, but the cut may split a character.
  const auto replace = json::error_handler_t::replace;
  if (text.size() <= kMaxQuoted) return json(text).dump(-1, ' ', false, replace);
  return json(text.substr(0, kMaxQuoted) + "...").dump(-1, ' ', false, replace);
}

std::string describe(const json& value) {
  switch (value.type()) {
    case json::value_t::string:
      return "the string " + quote(value.get_ref<const std::string&>());
    case json::value_t::number_integer:
    case json::value_t::number_unsigned:
    case json::value_t::number_float:
      return "the number " + value.dump();
    case json::value_t::boolean:
      return value.get<bool>() ? "true" : "false";
    case json::value_t::array:
      return "an array";
    case json::value_t::object:
      return "an object";
    default:
      return "null";
  }
}

}  // namespace frspec
