// The k largest log-softmax values of a row: each chunk of columns gives its best and its part of
// the softmax sum, and the chunks are merged in order.
#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/workspace.h"

namespace frspec::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Inserts behind equal logits: the columns come in ascending order.
void insert(TokenLogit* best, int32_t& count, int64_t k, TokenLogit entry) {
  int32_t at = count < k ? count++ : static_cast<int32_t>(k) - 1;
  for (; at > 0 && best[at - 1].logit < entry.logit; --at) best[at] = best[at - 1];
  best[at] = entry;
}

// The sum of exp(x - max) without what is NaN.
float exp_sum_of_numbers(const float* x, int64_t count, float max) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (x[i] == x[i]) sum += std::exp(double{x[i]} - max);
  }
  return static_cast<float>(sum);
}

void scan_chunk(const Kernels& kernels, TopkChunk& chunk, const float* logits, int64_t first,
                int64_t count, int64_t k) {
  chunk.max = kernels.maximum(logits + first, count);
  // Of an infinite maximum exp(inf - inf) would be NaN; the sum is then of no interest.
  chunk.sum = std::isinf(chunk.max) ? (chunk.max > 0 ? 1.0f : 0.0f)
                                    : kernels.exp_sum(logits + first, count, chunk.max, 1.0f);
  if (std::isnan(chunk.sum)) chunk.sum = exp_sum_of_numbers(logits + first, count, chunk.max);
  chunk.count = 0;
  int64_t i = 0;
  for (; i < count && chunk.count < k; ++i) {
    const float logit = logits[first + i];
    insert(chunk.best, chunk.count, k,
           {logit == logit ? logit : kLowest, static_cast<int32_t>(first + i)});
  }
  while (i < count) {
    i = kernels.find_greater(logits + first, i, count, chunk.best[k - 1].logit);
    if (i == count) break;
    insert(chunk.best, chunk.count, k, {logits[first + i], static_cast<int32_t>(first + i)});
    ++i;
  }
}

void merge_chunks(const TopkChunk* chunks, int64_t count, float* logprobs, int32_t* tokens,
                  const int32_t* column_tokens, int64_t k) {
  TokenLogit best[kMaxTreeTopK];
  int32_t found = 0;
  float max = kLowest;
  for (int64_t c = 0; c < count; ++c) {
    max = std::max(max, chunks[c].max);
    for (int32_t i = 0; i < chunks[c].count; ++i) {
      const TokenLogit& entry = chunks[c].best[i];
      if (found == k && !(entry.logit > best[k - 1].logit)) break;
      insert(best, found, k, entry);
    }
  }
  double sum = 0;
  for (int64_t c = 0; c < count; ++c) {
    if (chunks[c].sum == 0.0f) continue;
    sum += chunks[c].sum * (chunks[c].max == max ? 1.0 : std::exp(double{chunks[c].max} - max));
  }
  const double log_sum = std::isinf(max) ? 0.0 : std::log(sum);
  for (int64_t i = 0; i < k; ++i) {
    const float logit = best[i].logit;
    const double below_max = logit == max ? 0.0 : double{logit} - max;
    logprobs[i] = logit == kLowest ? kLowest : static_cast<float>(below_max - log_sum);
    tokens[i] = column_tokens == nullptr ? best[i].token : column_tokens[best[i].token];
  }
}

}  // namespace

void CpuBackend::topk_logprobs(float* logprobs, int32_t* tokens, const Tensor& logits,
                               const int32_t* column_tokens, int64_t k) {
  FRSPEC_CHECK(k > 0 && k <= kMaxTreeTopK && k <= logits.cols, Error, "topk_logprobs: k is ", k,
               ", expected 1 to ", std::min<int64_t>(kMaxTreeTopK, logits.cols));
  FRSPEC_CHECK(logits.cols <= limits_.vocab, Error, "topk_logprobs: ", logits.cols,
               " columns exceed the planned workspace of ", limits_.vocab);
  const int64_t chunks = column_chunks(logits.cols);
  const int64_t batch = std::min(kTopkRows, limits_.rows);
  FRSPEC_CHECK(batch > 0 || logits.rows == 0, Error, "topk_logprobs: no rows were planned");
  for (int64_t first = 0; first < logits.rows; first += batch) {
    const int64_t rows = std::min(batch, logits.rows - first);
    pool_.parallel_for(rows * chunks, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = i % chunks * kColumnChunk;
        scan_chunk(kernels_, topk_chunks_[i], logits.row<float>(first + i / chunks), column,
                   std::min(kColumnChunk, logits.cols - column), k);
      }
    });
    for (int64_t r = 0; r < rows; ++r) {
      merge_chunks(topk_chunks_ + r * chunks, chunks, logprobs + (first + r) * k,
                   tokens + (first + r) * k, column_tokens, k);
    }
  }
}

}  // namespace frspec::cpu
