#include "sub_vocab.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>

#include "check.h"
#include "file_fixtures.h"

using namespace frspec;        // NOLINT
using namespace frspec::test;  // NOLINT

namespace {

struct RankingFile {
  std::vector<int32_t> token_ids = {5, 3, 9, 0, 7, 1, 8, 2};
  std::vector<int64_t> counts = {80, 70, 60, 50, 40, 30, 20, 10};
  std::map<std::string, std::string> metadata = {
      {"format", "frspec-ranking"}, {"version", "1"},
      {"special_ids", "[1]"},       {"tokenizer_fingerprint", "abc"},
      {"corpus", "test"},           {"tokens_counted", "360"},
      {"vocab_size", "10"}};

  std::string write(const TempFolder& folder) const {
    return folder.write(
        "ranking.safetensors",
        safetensors_bytes(
            {{"counts", "I64", {static_cast<int64_t>(counts.size())}, bytes_of(counts)},
             {"token_ids", "I32", {static_cast<int64_t>(token_ids.size())}, bytes_of(token_ids)}},
            metadata));
  }
};

std::vector<int32_t> read(const RankingFile& ranking, int64_t size,
                          const std::vector<int32_t>& eos = {}, int64_t vocab_size = 10) {
  const TempFolder folder;
  return read_sub_vocab(ranking.write(folder), size, vocab_size, eos, "abc");
}

std::string error(const RankingFile& ranking, int64_t size = 4,
                  const std::vector<int32_t>& eos = {}, int64_t vocab_size = 10,
                  const std::string& fingerprint = "abc") {
  const TempFolder folder;
  const std::string path = ranking.write(folder);
  const std::string message = error_message<RankingError>(
      [&] { read_sub_vocab(path, size, vocab_size, eos, fingerprint); });
  check_names(message, {path});
  return message;
}

using Tokens = std::vector<int32_t>;

}  // namespace

TEST_CASE("sub_vocab: special tokens replace the least frequent and keep their rank") {
  const RankingFile ranking;
  CHECK(read(ranking, 8) == Tokens{5, 3, 9, 0, 7, 1, 8, 2});  // everything
  CHECK(read(ranking, 6) == Tokens{5, 3, 9, 0, 7, 1});        // 1 is in the prefix anyway
  CHECK(read(ranking, 4) == Tokens{5, 3, 9, 1});              // 1 replaces 0
  CHECK(read(ranking, 1) == Tokens{1});
  CHECK(read(ranking, 4, {2, 9}) == Tokens{5, 9, 1, 2});  // 9 is in the prefix, 1 and 2 are not
  CHECK(read(ranking, 4, {6, 4}) == Tokens{5, 1, 4, 6});  // 4 and 6 are not ranked: last, ascending
  CHECK(read(ranking, 3, {1, 1}) == Tokens{5, 3, 1});     // the same special twice
  CHECK(read(ranking, 8, {4}) == Tokens{5, 3, 9, 0, 7, 1, 8, 4});
}

TEST_CASE("sub_vocab: special tokens that the model has no row for are left out") {
  RankingFile ranking;
  ranking.metadata["special_ids"] = "[1, 10, 4000000000]";
  CHECK(read(ranking, 2, {12, -1}) == Tokens{5, 1});
  ranking.metadata["special_ids"] = "[]";
  CHECK(read(ranking, 2) == Tokens{5, 3});
}

TEST_CASE("sub_vocab: the fingerprint is checked unless none is expected") {
  const RankingFile ranking;
  check_names(error(ranking, 4, {}, 10, "xyz"), {"\"xyz\"", "found one for \"abc\""});
  const TempFolder folder;
  const std::string path = ranking.write(folder);
  CHECK(read_sub_vocab(path, 2, 10, {}, "") == Tokens{5, 1});
  RankingFile unnamed;
  unnamed.metadata.erase("tokenizer_fingerprint");
  check_names(error(unnamed), {"\"abc\"", "found one for none"});
}

TEST_CASE("sub_vocab: sizes") {
  const RankingFile ranking;
  check_names(error(ranking, 0), {"1 to 10", "found 0"});
  check_names(error(ranking, -5), {"1 to 10", "found -5"});
  check_names(error(ranking, 11), {"1 to 10", "found 11"});
  check_names(error(ranking, 9), {"at most the 8 tokens that the file ranks", "found 9"});
  check_names(error(ranking, 2, {2, 3}), {"the 3 special tokens", "found size 2"});
}

TEST_CASE("sub_vocab: ids and counts that are refused") {
  RankingFile ranking;
  ranking.token_ids[2] = 10;
  check_names(error(ranking), {"token_ids[2]", "from 0 to 9", "found 10"});
  ranking.token_ids[2] = -1;
  check_names(error(ranking), {"token_ids[2]", "found -1"});
  ranking.token_ids[2] = 5;
  check_names(error(ranking), {"token_ids[2]", "found 5 again"});
  // Ids beyond the asked-for size are checked too.
  RankingFile tail;
  tail.token_ids[7] = 10;
  check_names(error(tail), {"token_ids[7]", "found 10"});
  RankingFile unordered;
  unordered.counts[3] = 61;
  check_names(error(unordered), {"counts[3]", "descending", "found 61 after 60"});
  RankingFile negative;
  negative.counts = {1, 1, 1, 1, 1, 1, 1, -1};
  check_names(error(negative), {"counts[7]", "found -1"});
  RankingFile fewer;
  fewer.counts.pop_back();
  check_names(error(fewer), {"as many counts as token_ids", "found 7 and 8"});
}

TEST_CASE("sub_vocab: files that are no rankings") {
  RankingFile ranking;
  ranking.metadata["format"] = "pt";
  check_names(error(ranking), {"format \"frspec-ranking\"", "found \"pt\""});
  ranking.metadata.erase("format");
  check_names(error(ranking), {"found none"});
  RankingFile newer;
  newer.metadata["version"] = "2";
  check_names(error(newer), {"version \"1\"", "found \"2\""});
  RankingFile specials;
  for (const char* text : {"", "1", "[1", "[-1]", "[1.5]", "[\"a\"]"}) {
    specials.metadata["special_ids"] = text;
    check_names(error(specials), {"special_ids"});
  }
  specials.metadata.erase("special_ids");
  check_names(error(specials), {"special_ids", "found none"});

  const TempFolder folder;
  const auto read_error = [&](const std::string& bytes) {
    const std::string path = folder.write("x.safetensors", bytes);
    return error_message<RankingError>([&] { read_sub_vocab(path, 1, 10, {}, ""); });
  };
  check_names(read_error("PK\3\4 a zip archive, say"), {folder.path("x.safetensors")});
  check_names(
      error_message<RankingError>([&] { read_sub_vocab(folder.path("none"), 1, 10, {}, ""); }),
      {folder.path("none"), "cannot open"});
  const std::map<std::string, std::string> metadata = RankingFile().metadata;
  const FileTensor counts{"counts", "I64", {1}, bytes_of<int64_t>({1})};
  check_names(read_error(safetensors_bytes({counts}, metadata)), {"\"token_ids\"", "found none"});
  check_names(read_error(safetensors_bytes(
                  {counts, {"token_ids", "I64", {1}, bytes_of<int64_t>({1})}}, metadata)),
              {"token_ids", "expected int32", "found int64"});
  check_names(read_error(safetensors_bytes(
                  {counts, {"token_ids", "I32", {1, 1}, bytes_of<int32_t>({1})}}, metadata)),
              {"token_ids", "one dimension", "[1, 1]"});
}

TEST_CASE("sub_vocab: a ranking of a whole large vocabulary serves every size") {
  RankingFile ranking;
  constexpr int64_t kVocabSize = 50000;
  ranking.token_ids.resize(kVocabSize);
  std::iota(ranking.token_ids.rbegin(), ranking.token_ids.rend(), 0);
  ranking.counts.resize(kVocabSize);
  std::iota(ranking.counts.rbegin(), ranking.counts.rend(), 0);
  for (const int64_t size : {int64_t{1}, int64_t{8192}, int64_t{16384}, kVocabSize}) {
    const Tokens tokens = read(ranking, size, {}, kVocabSize);
    REQUIRE(tokens.size() == static_cast<size_t>(size));
    CHECK(std::find(tokens.begin(), tokens.end(), 1) != tokens.end());
    CHECK(std::is_sorted(tokens.rbegin(), tokens.rend()));  // rank order
    if (size > 1) CHECK(tokens[0] == kVocabSize - 1);
  }
}
