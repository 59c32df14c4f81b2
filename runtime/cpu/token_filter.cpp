#include "cpu/token_filter.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace frspec::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

bool likelier(const TokenLogit& a, const TokenLogit& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

struct Row {
  const Kernels& kernels;
  const float* logits;
  int64_t vocab;
  float max;
  double temperature;

  // The probability relative to the likeliest token's.
  double weight(float logit) const { return std::exp((double{logit} - max) / temperature); }
};

int64_t keep_top_k(const Row& row, TokenLogit* kept, int64_t k) {
  // Of a buffer of twice k (and some) the worse part is dropped whenever it is full.
  const int64_t capacity = std::min(row.vocab, 2 * k + 1024);
  int64_t count = 0;
  float threshold = kLowest;
  bool full = false;  // k tokens at or above the threshold are known
  for (int64_t i = 0;; ++i) {
    // Tokens come in ascending order, so one that equals the threshold is less likely.
    i = full ? row.kernels.find_greater(row.logits, i, row.vocab, threshold)
             : row.kernels.find_not_less(row.logits, i, row.vocab, threshold);
    if (i >= row.vocab) break;
    kept[count++] = {row.logits[i], static_cast<int32_t>(i)};
    if (count == capacity && count > k) {
      std::nth_element(kept, kept + k - 1, kept + count, likelier);
      count = k;
      threshold = kept[k - 1].logit;
      full = true;
    }
  }
  if (count > k) std::nth_element(kept, kept + k - 1, kept + count, likelier);
  return std::min(count, k);
}

// Sorts the tokens, and keeps them until their mass reaches the wanted one.
int64_t keep_mass(const Row& row, TokenLogit* kept, int64_t count, double mass, double wanted) {
  std::sort(kept, kept + count, likelier);
  for (int64_t i = 0; i < count; ++i) {
    mass += row.weight(kept[i].logit);
    if (mass >= wanted) return i + 1;
  }
  return count;
}

// top-p over the whole vocabulary: a histogram of the mass by logit finds the few tokens among
// which the wanted mass is crossed, and only these are sorted.
int64_t keep_top_p(const Row& row, TokenLogit* kept, double top_p) {
  constexpr int kBins = 1024;
  constexpr float kBinsPerUnit = 32.0f;
  constexpr int64_t kBlock = 1024;
  const float temperature = static_cast<float>(row.temperature);
  const auto bin = [&](float logit) {
    const float distance = (row.max - logit) / temperature * kBinsPerUnit;
    return distance < kBins - 1 ? static_cast<int>(distance) : kBins - 1;
  };
  double mass[kBins] = {};
  float weights[kBlock];
  for (int64_t first = 0; first < row.vocab; first += kBlock) {
    const int64_t count = std::min(kBlock, row.vocab - first);
    row.kernels.exponentials(weights, row.logits + first, count, row.max, 1.0f / temperature);
    for (int64_t i = 0; i < count; ++i) {
      const float logit = row.logits[first + i];
      if (logit == logit) mass[bin(logit)] += weights[i];
    }
  }
  double total = 0;
  for (const double part : mass) total += part;
  const double wanted = top_p * total;
  double before = 0;
  int crossing = 0;
  while (crossing < kBins - 1 && before + mass[crossing] < wanted) before += mass[crossing++];

  // Bins before the crossing are kept whole; they gather in front, the crossing bin behind them.
  const float edge = row.max - static_cast<float>(crossing + 2) / kBinsPerUnit * temperature;
  const float least = crossing == kBins - 1 ? kLowest : edge - std::fabs(edge) * 1e-5f;
  int64_t whole = 0;
  int64_t count = 0;
  for (int64_t i = 0;; ++i) {
    i = row.kernels.find_not_less(row.logits, i, row.vocab, least);
    if (i >= row.vocab) break;
    const int at = bin(row.logits[i]);
    if (at > crossing) continue;
    kept[count++] = {row.logits[i], static_cast<int32_t>(i)};
    if (at < crossing) std::swap(kept[whole++], kept[count - 1]);
  }
  return whole + keep_mass(row, kept + whole, count - whole, before, wanted);
}

}  // namespace

int64_t filter_tokens(const Kernels& kernels, TokenLogit* kept, const float* logits, int64_t vocab,
                      float max, const Sampling& sampling) {
  const Row row{kernels, logits, vocab, max, sampling.temperature};
  int64_t count = 0;
  if (sampling.top_k > 0 && sampling.top_k < vocab) {
    count = keep_top_k(row, kept, sampling.top_k);
    if (sampling.top_p < 1.0f) {
      double total = 0;
      std::sort(kept, kept + count, likelier);
      for (int64_t i = 0; i < count; ++i) total += row.weight(kept[i].logit);
      count = keep_mass(row, kept, count, 0, double{sampling.top_p} * total);
    }
  } else if (sampling.top_p < 1.0f) {
    count = keep_top_p(row, kept, sampling.top_p);
  } else {
    const float edge = max + sampling.temperature * std::log(sampling.min_p);
    const float least = edge - std::fabs(edge) * 1e-5f - 1e-3f * sampling.temperature;
    for (int64_t i = 0;; ++i) {
      i = kernels.find_not_less(logits, i, vocab, least);
      if (i >= vocab) break;
      kept[count++] = {logits[i], static_cast<int32_t>(i)};
    }
  }
  if (sampling.min_p > 0.0f) {
    count = std::remove_if(kept, kept + count,
                           [&](const TokenLogit& entry) {
                             return row.weight(entry.logit) < double{sampling.min_p};
                           }) -
            kept;
  }
  return count;
}

}  // namespace frspec::cpu
