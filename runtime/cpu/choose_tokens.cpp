// The token that follows each row of logits (sampling.h says what that means). Every path here
// computes exactly that definition; what they skip cannot change the result.
#include <algorithm>
#include <bit>
#include <cmath>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/token_filter.h"

namespace frspec::cpu {
namespace {

// Gumbel noise -log(-log1p(-v)) <= -log(v), and v > 2^-(leading zeros + 1); with room for rounding.
constexpr float kLn2 = 0.6932f;
constexpr float kMostNoise = 23.0f;  // > 33 ln 2

float noise_bound(uint32_t bits) { return static_cast<float>(std::countl_zero(bits) + 1) * kLn2; }

// The best of logit / T + noise seen so far; ties go to the lower token.
struct NoisyBest {
  float score;
  int32_t token;

  void offer(float scaled_logit, uint32_t bits, int32_t other) {
    if (scaled_logit + noise_bound(bits) < score) return;
    const float other_score = scaled_logit + gumbel_noise(bits);
    if (other_score > score || (other_score == score && other < token)) {
      score = other_score;
      token = other;
    }
  }
};

uint32_t noise_bits(uint64_t seed, int32_t position, int32_t token) {
  return token_noise_bits(seed, position, static_cast<uint32_t>(token) / 4).words[token % 4];
}

NoisyBest start(const TokenLogit& likeliest, const Sampling& sampling, int32_t position) {
  const uint32_t bits = noise_bits(sampling.seed, position, likeliest.token);
  return {likeliest.logit / sampling.temperature + gumbel_noise(bits), likeliest.token};
}

// Only logits above this can reach the score; NaN if all can.
float least_logit(float score, float temperature) {
  const float bound = (score - kMostNoise) * temperature;
  return bound - std::fabs(bound) * 1e-5f - 0.01f * temperature;
}

// The best of tokens first ... first + count - 1; first is a multiple of 4.
NoisyBest sample_chunk(const Kernels& kernels, const float* logits, int64_t first, int64_t count,
                       const Sampling& sampling, int32_t position, NoisyBest best) {
  const float* chunk = logits + first;
  int64_t i = 0;
  for (;;) {
    i = kernels.find_greater(chunk, i, count, least_logit(best.score, sampling.temperature));
    if (i >= count) return best;
    i = i / 4 * 4;
    const RandomBlock block =
        token_noise_bits(sampling.seed, position, static_cast<uint32_t>((first + i) / 4));
    for (int64_t j = 0; j < 4 && i + j < count; ++j) {
      best.offer(chunk[i + j] / sampling.temperature, block.words[j],
                 static_cast<int32_t>(first + i + j));
    }
    i += 4;
  }
}

}  // namespace

// The likeliest token of each row, with its logit, to chosen_chunks_[r chunks].
void CpuBackend::find_likeliest(const Tensor& logits) {
  const int64_t chunks = column_chunks(logits.cols);
  pool_.parallel_for(logits.rows * chunks, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * kColumnChunk;
      const int64_t count = std::min(kColumnChunk, logits.cols - first);
      const float* chunk = logits.row<float>(i / chunks) + first;
      const float max = kernels_.maximum(chunk, count);
      const int64_t at = kernels_.find_not_less(chunk, 0, count, max);
      // Nothing but NaN: the first.
      chosen_chunks_[i] = {max, static_cast<int32_t>(first + (at < count ? at : 0))};
    }
  });
  for (int64_t r = 0; r < logits.rows; ++r) {
    TokenLogit* row = chosen_chunks_ + r * chunks;
    for (int64_t c = 1; c < chunks; ++c) {
      if (row[c].logit > row[0].logit) row[0] = row[c];
    }
  }
}

void CpuBackend::sample_all(int32_t* tokens, const Tensor& logits, const Sampling& sampling,
                            const int32_t* positions) {
  // Each chunk starts from the likeliest token, whose score rules out most others.
  const int64_t chunks = column_chunks(logits.cols);
  pool_.parallel_for(logits.rows * chunks, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / chunks;
      const TokenLogit& likeliest = chosen_chunks_[r * chunks];
      NoisyBest best = start(likeliest, sampling, positions[r]);
      if (std::isfinite(best.score)) {
        const int64_t first = i % chunks * kColumnChunk;
        best =
            sample_chunk(kernels_, logits.row<float>(r), first,
                         std::min(kColumnChunk, logits.cols - first), sampling, positions[r], best);
      }
      noisy_chunks_[i] = {best.score, best.token};
    }
  });
  for (int64_t r = 0; r < logits.rows; ++r) {
    TokenLogit best = noisy_chunks_[r * chunks];
    for (int64_t c = 1; c < chunks; ++c) {
      const TokenLogit& other = noisy_chunks_[r * chunks + c];
      if (other.logit > best.logit || (other.logit == best.logit && other.token < best.token)) {
        best = other;
      }
    }
    tokens[r] = best.token;
  }
}

void CpuBackend::sample_filtered(int32_t* tokens, const Tensor& logits, const Sampling& sampling,
                                 const int32_t* positions) {
  const int64_t chunks = column_chunks(logits.cols);
  pool_.parallel_for(logits.rows, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t r = begin; r < end; ++r) {
      const TokenLogit likeliest = chosen_chunks_[r * chunks];
      NoisyBest best = start(likeliest, sampling, positions[r]);
      if (std::isfinite(best.score)) {
        TokenLogit* candidates = candidates_ + thread * limits_.vocab;
        const int64_t count = filter_tokens(kernels_, candidates, logits.row<float>(r), logits.cols,
                                            likeliest.logit, sampling);
        for (int64_t i = 0; i < count; ++i) {
          const float scaled = candidates[i].logit / sampling.temperature;
          if (scaled + kMostNoise < best.score) continue;
          best.offer(scaled, noise_bits(sampling.seed, positions[r], candidates[i].token),
                     candidates[i].token);
        }
      }
      tokens[r] = best.token;
    }
  });
}

void CpuBackend::choose_tokens(int32_t* tokens, const Tensor& logits, const Sampling* of_request,
                               const int32_t* positions) {
  const Sampling& sampling = *of_request;
  FRSPEC_CHECK(logits.dtype == DType::kF32 && logits.cols > 0, Error,
               "choose_tokens: logits must be fp32");
  FRSPEC_CHECK(logits.rows <= limits_.choice_rows && logits.cols <= limits_.vocab, Error,
               "choose_tokens: logits [", logits.rows, ", ", logits.cols,
               "] exceed the planned workspace [", limits_.choice_rows, ", ", limits_.vocab, "]");
  find_likeliest(logits);
  if (!(sampling.temperature > 0.0f)) {
    const int64_t chunks = column_chunks(logits.cols);
    for (int64_t r = 0; r < logits.rows; ++r) tokens[r] = chosen_chunks_[r * chunks].token;
  } else if (filters(sampling, logits.cols)) {
    sample_filtered(tokens, logits, sampling, positions);
  } else {
    sample_all(tokens, logits, sampling, positions);
  }
}

}  // namespace frspec::cpu
