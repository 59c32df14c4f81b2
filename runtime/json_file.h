// Strict JSON for files that come from elsewhere. Internal: included by .cpp files only.
#pragma once

#include <cstddef>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace frspec {

// Parses a whole JSON text. ModelError, beginning with `where`, for invalid or truncated JSON,
// a key that occurs twice in one object, or nesting deeper than 32.
nlohmann::json parse_json(std::string_view text, const std::string& where);

// Reads and parses a JSON file whose top level is an object. ModelError names the file; also for a
// file that is missing or larger than `max_bytes`.
nlohmann::json read_json_object(const std::string& path, size_t max_bytes);

// What a value is, for messages, in one short line: `the string "abc"`, `the number -3`, `an
// array`.
std::string describe(const nlohmann::json& value);

// A string from a file as it may stand in a message: quoted, escaped, at most 120 bytes of it.
std::string quote(const std::string& text);

}  // namespace frspec
