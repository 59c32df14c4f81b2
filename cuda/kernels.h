// The launchers of all kernels, one .cu file for each family. A launcher checks what it is given,
// chooses the grid, and starts its kernels on the stream; it neither allocates nor waits. Pointers
// are device memory. `dtype` is kBF16 or kF16, the type of weights, activations, keys and values.
//
// Letters as in runtime/backend.h: n rows, d hidden, H query heads, K key/value heads, D head
// dimension, V vocabulary, S columns of the draft head.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend.h"

namespace frspec::cuda {

// ==== row_ops.cu

// Throws where this build has no kernels for the current device.
void check_kernels();
// out row i = source row rows[i], clamped to [0, source_rows), of out's type and columns (multiples
// of 8, as are the strides).
void copy_rows(const Tensor& out, const void* source, int64_t source_stride, int64_t source_rows,
               const int32_t* rows, cudaStream_t stream);
// positions[i] = *end - n + i, prefix[i] = positions[i] + 1.
void number_rows(int32_t* positions, int32_t* prefix, const int32_t* end, int64_t n,
                 cudaStream_t stream);
// out [n, cols] = bias [cols] (or 0) + residual [n, cols] (or 0).
void fill_rows(const Tensor& out, const float* bias, const Tensor* residual, cudaStream_t stream);
// Dense rows of random elements, uniform with variance 1 / cols (runtime/synthetic.h).
void fill_random(const Tensor& out, uint64_t seed, cudaStream_t stream);
// up = silu(gate) * up, elementwise.
void multiply_silu(const Tensor& up, const Tensor& gate, cudaStream_t stream);
// x += silu(y), elementwise.
void add_silu(const Tensor& x, const Tensor& y, cudaStream_t stream);

// ==== linear.cu

// How the sum over k of one weight matrix is cut, by its shape and the device alone: each part is
// summed in ascending order of k by one block, and the parts are added in ascending order.
struct LinearSplit {
  int parts;
  int part_depth;  // k of a part, a multiple of 64
};
LinearSplit split_in_parts(int64_t in_features, int64_t parts);
LinearSplit split_linear(int64_t out_features, int64_t in_features, bool swiglu,
                         int multiprocessors);

// Scratch of a product of several parts: their fp32 sums.
struct LinearScratch {
  float* sums;
  size_t floats;
};
size_t linear_scratch(int64_t n, int64_t out_features, bool swiglu, const LinearSplit& split);
// Enough for n rows of any matrix.
size_t most_linear_scratch(int64_t n, int multiprocessors);

// out [n, o] (dtype or fp32) = x [n, i] . w [o, i]^T (+ bias) (+ residual): skinny tensor-core
// product that reads every weight once. up not null: out = silu(x . w^T) * (x . up^T).
void linear(const Tensor& out, const Tensor& x, const LinearWeight& w, const LinearWeight* up,
            const Tensor* residual, const LinearSplit& split, const LinearScratch& scratch,
            cudaStream_t stream);

// A product of several parts that are not added yet: out = parts (+ bias) (+ residual).
struct LinearParts {
  const float* sums;     // [parts, n, row_stride] fp32, in scratch
  int64_t part_stride;   // floats
  int64_t row_stride;    // floats, a multiple of 4
  int parts;             // 2 ... 8
  const float* bias;     // [o] or null
  const void* residual;  // [n, o] of the product's dtype, or null
  int64_t residual_stride;
};
// The first half of linear(), where split.parts > 1: what comes next adds the parts while it reads
// them, or add_parts() does.
LinearParts linear_parts(const Tensor& out, const Tensor& x, const LinearWeight& w,
                         const Tensor* residual, const LinearSplit& split,
                         const LinearScratch& scratch, cudaStream_t stream);
void add_parts(const Tensor& out, const LinearParts& parts, cudaStream_t stream);

// ==== rms_norm.cu

// parts not null: x is made of them first.
void rms_norm(const Tensor& out, const Tensor& x, const float* weight, float eps,
              const LinearParts* parts, cudaStream_t stream);

// ==== rope_and_append.cu

// parts not null: qkv is made of them; of its keys and values only the cache is written.
void rope_and_append(const Tensor& qkv, const KvLayer& kv, const Tensor& rope,
                     const int32_t* positions, const int32_t* slots, const LinearParts* parts,
                     cudaStream_t stream);

// ==== attention.cu

// A row's softmax is cut into parts: ranges of its committed positions, and its last positions.
struct AttentionScratch {
  float* partial_values;  // [parts, n H, padded D]
  float2* partial_sums;   // [parts, n H]: maximum, sum
  size_t rows;            // n H that there is room for, times parts
};
// Parts of a row of that many visible positions, and values of a part.
int64_t attention_parts(int64_t max_length);
int64_t padded_head_dim(int64_t head_dim);

// What decides how a range is shared among warps; the bits do not depend on it.
struct AttentionDevice {
  int multiprocessors;
  size_t shared_bytes;  // that a block may have
};

void attention(const Tensor& out, const Tensor& q, const KvLayer& kv, const Visible& visible,
               bool prompt, const AttentionScratch& scratch, const AttentionDevice& device,
               cudaStream_t stream);

// ==== topk_logprobs.cu

struct TopkScratch {
  float2* chunk_sums;       // [n, chunks]: maximum, sum of exponentials
  size_t sums;              // that there is room for
  uint64_t* chunk_entries;  // [n, chunks, k]
  size_t entries;
};
int64_t topk_chunks(int64_t cols);
void topk_logprobs(float* logprobs, int32_t* tokens, const Tensor& logits,
                   const int32_t* column_tokens, int64_t k, const TopkScratch& scratch,
                   cudaStream_t stream);

// ==== choose_tokens.cu

int64_t choice_chunks(int64_t vocab);
struct ChoiceScratch {
  uint64_t* chunk_best;  // [n, 2, chunks]
  size_t entries;        // that there is room for
};
void choose_tokens(int32_t* tokens, const Tensor& logits, const Sampling* sampling,
                   const int32_t* positions, const ChoiceScratch& scratch, cudaStream_t stream);

// ==== draft_tree.cu

void expand_beam(const DraftPool& pool, const DraftLevel& level, cudaStream_t stream);
void build_tree(const DraftTree& tree, const DraftPool& pool, const TreeRoot& root,
                cudaStream_t stream);
void build_static_tree(const DraftTree& tree, const StaticTree& shape, const int32_t* tokens,
                       const TreeRoot& root, cudaStream_t stream);
void walk_tree(const TreeWalk& walk, const DraftTree& tree, const int32_t* chosen,
               cudaStream_t stream);
void plant_tree(const DraftTree& tree, const Plant* plant, cudaStream_t stream);
void commit_kv(const KvLayer* layers, int64_t layer_count, const int32_t* base, const int32_t* path,
               const int32_t* path_length, cudaStream_t stream);

}  // namespace frspec::cuda
