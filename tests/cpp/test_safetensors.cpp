#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <random>

#include "check.h"
#include "checkpoint.h"
#include "file_fixtures.h"
#include "safetensors.h"

using namespace frspec;        // NOLINT
using namespace frspec::test;  // NOLINT

namespace {

const std::vector<FileTensor> kTensors = {
    {"model.a.weight", "F32", {2, 3}, bytes_of<float>({1, 2, 3, 4, 5, 6})},
    {"model.b.weight", "BF16", {4}, bytes_of<uint16_t>({0x3f80, 0x4000, 0x4040, 0x4080})},
    {"ids", "I64", {1}, bytes_of<int64_t>({-7})},
    {"fp8", "F8_E4M3", {2, 2}, "abcd"},
    {"empty", "F32", {0, 5}, ""},
};

std::string open_error(const std::string& bytes) {
  const TempFolder folder;
  const std::string path = folder.write("x.safetensors", bytes);
  const std::string message = error_message<ModelError>([&] { SafetensorsFile file(path); });
  check_names(message, {path});
  return message;
}

std::string header_error(const std::string& header, size_t data_bytes) {
  return open_error(safetensors_bytes(header, std::string(data_bytes, 'x')));
}

// A header with one tensor "t".
std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"t":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}

}  // namespace

TEST_CASE("safetensors: tensors, metadata and names of a well-formed file") {
  const TempFolder folder;
  const SafetensorsFile file(
      folder.write("x.safetensors", safetensors_bytes(kTensors, {{"format", "pt"}, {"k", "v"}})));
  CHECK(file.names() ==
        std::vector<std::string>{"empty", "fp8", "ids", "model.a.weight", "model.b.weight"});
  CHECK(file.metadata() == std::map<std::string, std::string>{{"format", "pt"}, {"k", "v"}});
  CHECK(file.contains("ids"));
  CHECK_FALSE(file.contains("__metadata__"));

  const HostTensor a = file.tensor("model.a.weight");
  CHECK(a.dtype == DType::kF32);
  CHECK(a.shape == std::vector<int64_t>{2, 3});
  CHECK(a.bytes == 24);
  CHECK(a.file == &file);
  CHECK(std::memcmp(a.data, kTensors[0].data.data(), 24) == 0);
  const HostTensor b = file.tensor("model.b.weight");
  CHECK(b.dtype == DType::kBF16);
  CHECK(static_cast<const uint16_t*>(b.data)[3] == 0x4080);
  CHECK(*static_cast<const int64_t*>(file.tensor("ids").data) == -7);
  CHECK(file.tensor("empty").bytes == 0);

  check_names(error_message<ModelError>([&] { file.tensor("fp8"); }),
              {file.path(), "\"fp8\"", "expected dtype", "found F8_E4M3"});
  check_names(error_message<ModelError>([&] { file.tensor("zzz"); }), {file.path(), "\"zzz\""});
}

TEST_CASE("safetensors: a file without tensors is well formed") {
  const TempFolder folder;
  const SafetensorsFile file(folder.write("x.safetensors", safetensors_bytes("{}", "")));
  CHECK(file.names().empty());
}

TEST_CASE("safetensors: release drops the pages, and the bytes are read again") {
  const TempFolder folder;
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const std::string big(size_t{8} << 20, 'q');
  const SafetensorsFile file(
      folder.write("x.safetensors",
                   safetensors_bytes({{"big", "F16", {static_cast<int64_t>(big.size() / 2)}, big},
                                      {"next", "F16", {2}, "abcd"}})));
  const HostTensor tensor = file.tensor("big");
  CHECK(std::memcmp(tensor.data, big.data(), big.size()) == 0);
  const auto resident_kib = [&] {
    // mincore() sees the page cache; what this process holds is in smaps.
    std::ifstream maps("/proc/self/smaps");
    std::string line;
    bool inside = false;
    while (std::getline(maps, line)) {
      if (line.find(".safetensors") != std::string::npos) inside = true;
      if (inside && line.rfind("Rss:", 0) == 0) return std::stoul(line.substr(4));
    }
    return 0UL;
  };
  const size_t before = resident_kib();
  CHECK(before * 1024 >= big.size());
  file.release(tensor, tensor.bytes / 2);
  const size_t half = resident_kib();
  CHECK(half < before * 2 / 5);  // two of the eight MiB were dropped besides
  CHECK(half > before / 8);
  file.release(tensor, tensor.bytes);
  const size_t after = resident_kib();
  CHECK(after * 1024 <= 3 * page);
  CHECK(std::memcmp(tensor.data, big.data(), big.size()) == 0);
  CHECK(std::memcmp(file.tensor("next").data, "abcd", 4) == 0);
  file.release(file.tensor("next"), 4096);
  CHECK(std::memcmp(file.tensor("next").data, "abcd", 4) == 0);
}

TEST_CASE("safetensors: unaligned data is refused when the tensor is asked for") {
  // The data begins at an odd byte, or at one that is even but no multiple of four.
  const TempFolder folder;
  for (const size_t misalignment : {1, 2}) {
    std::string header = entry("F32", "[1]", "[0,4]");
    while (header.size() % 4 != misalignment) header += ' ';
    const SafetensorsFile file(folder.write("x.safetensors", safetensors_bytes(header, "1234")));
    check_names(error_message<ModelError>([&] { file.tensor("t"); }),
                {"\"t\"", "aligned to 4 bytes", "found it at byte"});
  }
  std::string header = entry("F16", "[2]", "[0,4]");
  while (header.size() % 4 != 2) header += ' ';
  const SafetensorsFile file(folder.write("y.safetensors", safetensors_bytes(header, "1234")));
  CHECK(file.tensor("t").bytes == 4);
}

TEST_CASE("safetensors: files that are no safetensors files") {
  const TempFolder folder;
  check_names(error_message<ModelError>([&] { SafetensorsFile(folder.path("none")); }),
              {folder.path("none"), "cannot open"});
  check_names(error_message<ModelError>([&] { SafetensorsFile(folder.path()); }),
              {"expected a regular file"});
  REQUIRE(mkfifo(folder.path("fifo").c_str(), 0600) == 0);
  check_names(error_message<ModelError>([&] { SafetensorsFile(folder.path("fifo")); }),
              {"expected a regular file"});
  check_names(open_error(""), {"found 0"});
  check_names(open_error("12345678"), {"found 8"});
  check_names(open_error(std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)),
              {"header of at most 100000000", "found 18446744073709551615"});
  check_names(open_error(std::string("\x10\0\0\0\0\0\0\0{}", 10)),
              {"header of 16 bytes", "found only 2"});
  check_names(open_error(std::string("\0\0\0\0\0\0\0\0{}", 10)), {"begins with '{'"});
  check_names(header_error("[1]", 0), {"begins with '{'"});
}

TEST_CASE("safetensors: headers that are no JSON, or not the format's") {
  check_names(header_error(R"({"t":)", 0), {"(header)", "truncated"});
  check_names(header_error(R"({"t":x})", 0), {"found an error at byte 6"});
  check_names(header_error(R"({"t":{}} {})", 0), {"expected JSON"});
  check_names(header_error(std::string("{}\0{}", 5), 0), {"NUL"});
  check_names(header_error("{\"\xff\":1}", 0), {"expected JSON"});
  check_names(header_error(R"({"t":1e999})", 0), {"out of range"});
  check_names(header_error(R"({"a":1,"a":2})", 0), {"\"a\" twice"});
  check_names(header_error(R"({"t":{"shape":[0],"shape":[0]}})", 0), {"\"shape\" twice"});
  check_names(header_error(R"({"t":)" + std::string(100000, '['), 0), {"nested at most 32"});
  check_names(header_error(R"({"__metadata__":[]})", 0), {"__metadata__", "found an array"});
  check_names(header_error(R"({"__metadata__":{"a":1}})", 0), {"\"a\"", "found the number 1"});
  check_names(header_error(R"({"t":7})", 0), {"tensor \"t\"", "expected an object"});
  // A name with a line break, or a very long one, leaves the message one short line.
  check_names(header_error(R"({"a\nb":7})", 0), {R"("a\nb")"});
  check_names(header_error("{\"" + std::string(5000, 'a') + "\":7}", 0), {"aaa..."});
}

TEST_CASE("safetensors: lying entries") {
  check_names(header_error(R"({"t":{"shape":[1],"data_offsets":[0,4]}})", 4), {"\"dtype\""});
  check_names(header_error(R"({"t":{"dtype":"F32","data_offsets":[0,4]}})", 4), {"\"shape\""});
  check_names(header_error(R"({"t":{"dtype":"F32","shape":[1]}})", 4), {"\"data_offsets\""});
  check_names(header_error(entry("F31", "[1]", "[0,4]"), 4), {"dtype of the format", "\"F31\""});
  check_names(header_error(R"({"t":{"dtype":3,"shape":[1],"data_offsets":[0,4]}})", 4),
              {"dtype name", "found the number 3"});
  check_names(header_error(entry("F32", "[-1]", "[0,4]"), 4), {"a shape", "found the number -1"});
  check_names(header_error(entry("F32", "[1.0]", "[0,4]"), 4), {"a shape", "found the number 1.0"});
  check_names(header_error(entry("F32", "3", "[0,4]"), 4), {"a shape", "found the number 3"});
  check_names(header_error(entry("F32", "[9223372036854775808]", "[0,4]"), 4), {"a shape"});
  check_names(header_error(entry("F32", "[4294967296,4294967296]", "[0,4]"), 4),
              {"[4294967296, 4294967296]", "below 2^61"});
  check_names(header_error(entry("F32", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,4]"), 4),
              {"at most 16 dimensions", "found 17"});
  check_names(header_error(entry("F4", "[3]", "[0,2]"), 2), {"whole bytes", "found 12 bits"});
  check_names(header_error(entry("F32", "[1]", "[0]"), 4), {"[begin, end]", "found 1 numbers"});
  check_names(header_error(entry("F32", "[1]", "[0,-4]"), 4), {"data_offsets"});
  check_names(header_error(entry("F32", "[1]", "[4,0]"), 4), {"in order", "found [4, 0]"});
  check_names(header_error(entry("F32", "[2]", "[0,8]"), 4),
              {"within 4 bytes", "outside the file"});
  check_names(header_error(entry("F32", "[1]", "[0,18446744073709551615]"), 4), {"data_offsets"});
  check_names(header_error(entry("F32", "[2]", "[0,4]"), 4),
              {"expected 8 bytes", "F32 [2]", "found data_offsets of 4"});
  const auto two = [](const std::string& a, const std::string& b) {
    return R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)" + a +
           R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + b + "}}";
  };
  check_names(header_error(two("[0,4]", "[2,6]"), 8),
              {"\"b\"", "begin at 4", "found 2", "an overlap"});
  check_names(header_error(two("[0,4]", "[5,9]"), 9), {"\"b\"", "begin at 4", "found 5", "a hole"});
  check_names(header_error(two("[1,5]", "[5,9]"), 9), {"\"a\"", "begin at 0", "a hole"});
  check_names(header_error(two("[0,4]", "[4,8]"), 9), {"end at 8", "found 9 bytes"});
}

TEST_CASE("safetensors: every truncation of a valid file is refused") {
  const std::string bytes = safetensors_bytes(kTensors, {{"format", "pt"}});
  const TempFolder folder;
  for (size_t length = 0; length < bytes.size(); ++length) {
    const std::string path = folder.write("x.safetensors", bytes.substr(0, length));
    CHECK_THROWS_AS(SafetensorsFile{path}, ModelError);
  }
}

TEST_CASE("safetensors: random damage to a header gives a ModelError or valid tensors") {
  const std::string valid = safetensors_bytes(kTensors, {{"format", "pt"}});
  uint64_t header_length = 0;
  std::memcpy(&header_length, valid.data(), 8);
  const std::vector<std::string> tokens = {"0",     "-1",   "9223372036854775807",
                                           "1e308", "null", "[",
                                           "]",     "{",    "}",
                                           "\"",    ",",    ":",
                                           "\\",    "4",    "12",
                                           "F64",   "BF16", "18446744073709551615",
                                           "\xf0"};
  std::mt19937_64 random(20240229);
  const auto below = [&](size_t limit) { return static_cast<size_t>(random() % limit); };
  const TempFolder folder;
  int refused = 0;
  int accepted = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string bytes = valid;
    const size_t edits = 1 + below(3);
    for (size_t edit = 0; edit < edits; ++edit) {
      const size_t at = below(8 + header_length);
      switch (below(4)) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1: {  // a token in the place of as many bytes: the lengths stay right
          const std::string& token = tokens[below(tokens.size())];
          bytes.replace(at, std::min(token.size(), bytes.size() - at), token);
          break;
        }
        case 2: {  // digits are where the lies are
          const size_t digit = bytes.find_first_of("0123456789", at);
          if (digit != std::string::npos) bytes[digit] = static_cast<char>('0' + below(10));
          break;
        }
        default:
          bytes.erase(at, 1 + below(4));
      }
    }
    const std::string path = folder.write("x.safetensors", bytes);
    try {
      const SafetensorsFile file(path);
      size_t data_bytes = 0;
      for (const std::string& name : file.names()) {
        try {
          const HostTensor tensor = file.tensor(name);
          data_bytes += tensor.bytes;
          if (tensor.bytes == 0) continue;
          const auto* first = static_cast<const volatile unsigned char*>(tensor.data);
          static_cast<void>(first[0] + first[tensor.bytes - 1]);
          file.release(tensor, tensor.bytes);
        } catch (const ModelError&) {
        }
      }
      CHECK(data_bytes < bytes.size());
      ++accepted;
    } catch (const ModelError& error) {
      REQUIRE(std::string(error.what()).find('\n') == std::string::npos);
      ++refused;
    }
  }
  // Both happen, or the mutations are too timid or too wild to test anything.
  CHECK(refused > 1000);
  CHECK(accepted > 20);
}
