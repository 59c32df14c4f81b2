// FR-Spec's sub-vocabulary: the tokens that a drafter scores, chosen from a ranking file.
//
// A ranking file is a safetensors file: `token_ids` int32 [n], most frequent first, and `counts`
// int64 [n]; metadata format = "frspec-ranking", version = "1", tokenizer_fingerprint and
// special_ids (a JSON list), and what is only told: vocab_size, corpus, tokens_counted, source,
// parts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace frspec {

// The token id of each column of the drafter's head, in rank order. Exactly `size` tokens:
// `eos_token_ids` and the file's special_ids below vocab_size always, the rest by frequency. A
// special token outside the first `size` takes the place of the least frequent ordinary token, and
// stands where its rank puts it (specials that the file does not rank stand last, ascending).
//
// RankingError: the file is not a ranking, was made for another tokenizer (expected_fingerprint; an
// empty one is not checked), holds ids outside [0, vocab_size) or duplicates, or `size` is below 1,
// below the number of specials, or above what the file or the vocabulary holds.
std::vector<int32_t> read_sub_vocab(const std::string& path, int64_t size, int64_t vocab_size,
                                    const std::vector<int32_t>& eos_token_ids,
                                    const std::string& expected_fingerprint);

}  // namespace frspec
