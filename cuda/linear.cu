// Skinny matrix products: few rows of activations times one large weight matrix, the work of
// decoding and verifying, bound by reading the weights once.
//
//   out[m, o] = sum_k x[m, k] w[o, k] (+ bias[o]) (+ residual[m, o])
//   swiglu:     out[m, o] = silu(x[m] . gate[o]) * (x[m] . up[o]),  silu(v) = v / (1 + exp(-v))
//
// x: [n, i], w: [o, i] bf16 or fp16, row-major, rows aligned to 16 bytes; sums fp32; out of the
// same type or fp32.
//
// Weights are the A operand of the tensor cores (16 outputs), tokens the B operand (8 tokens). A
// block makes kTileOutputs outputs for up to 64 tokens from one part of k; each of its 4 warps owns
// 32 of the outputs and sums its whole part of k in ascending order in one chain of mma. A stage of
// the pipeline is 64 values of k of the weights and of x, copied asynchronously into shared memory;
// kStages - 1 of them are under way at any time, which is what keeps the memory busy. The first
// weights are asked for before the kernel in front has ended.
//
// The parts of k write fp32 sums to scratch memory, and the block that finishes last adds them in
// ascending order. Where the parts begin depends on the matrix and the device alone, so a row has
// the same bits whatever rows share the product, and whichever block comes last (contract 1).
#include <algorithm>
#include <type_traits>

#include "dispatch.h"
#include "kernels.h"
#include "launch.h"
#include "linear_epilogue.cuh"
#include "linear_params.cuh"
#include "ptx.cuh"

namespace frspec::cuda {
namespace {

// Piece `piece` of a row of a stage; the swizzle keeps ldmatrix free of bank conflicts.
template <typename T>
__device__ __forceinline__ T* stage_piece(T* stage, int row, int piece) {
  return stage + row * kDepth + ((piece ^ (row & 7)) << 3);
}

// What one thread copies of each stage of the weights: the same piece of rows row + kPassRows * j
// of the tile. Of a swiglu tile every warp has 16 gate rows and the 16 up rows of the same outputs.
template <typename T, bool kSwiglu>
struct WeightCursor {
  static constexpr int kPasses = kTileRows / kPassRows;
  static_assert(kPassRows == 16, "rows of one pass are of one matrix, and swizzled alike");
  const T* from;  // the thread's first row, at its piece of k = 0
  const T* up;    // swiglu: the same of the other matrix
  int64_t step;   // to the row of the next pass
  int row;
  int piece;
  unsigned inside;  // bit j: row + kPassRows * j is a row of the matrix

  __device__ __forceinline__ WeightCursor(const LinearParams& p, int tile)
      : step(int64_t{kPassRows} * p.in_features),
        row(threadIdx.x / kPieces),
        piece(threadIdx.x % kPieces),
        inside(0) {
    const int first = tile * kTileOutputs<kSwiglu> + row;
    const int64_t at = static_cast<int64_t>(first) * p.in_features + piece * 8;
    from = static_cast<const T*>(p.w) + at;
    up = kSwiglu ? static_cast<const T*>(p.up) + at : nullptr;
#pragma unroll
    for (int j = 0; j < kPasses; ++j) {
      if (first + matrix_pass(j) * kPassRows < p.out_features) inside |= 1u << j;
    }
  }

  // Pass j of the tile is this pass of its matrix.
  static __device__ __forceinline__ int matrix_pass(int j) { return kSwiglu ? j / 2 : j; }

  __device__ __forceinline__ const T* address(int j, int k) const {
    return (kSwiglu && j % 2 == 1 ? up : from) + matrix_pass(j) * step + k;
  }

  __device__ __forceinline__ void load(T* stage, const LinearParams& p, int k, int k_end) const {
    T* to = stage_piece(stage, row, piece);
    const bool inside_k = k + piece * 8 < k_end;
#pragma unroll
    for (int j = 0; j < kPasses; ++j) {
      const bool copies = inside_k && (inside >> j & 1) != 0;
      copy_async_16(to + j * kPassRows * kDepth, copies ? address(j, k) : p.w, copies ? 16 : 0);
    }
  }

  // Asks for a stage that is not loaded yet: the 8 threads of a row, whose stage is one line of 128
  // bytes, take a pass each.
  __device__ __forceinline__ void prefetch(int k, int k_end) const {
    static_assert(kPasses == kPieces);
#pragma unroll
    for (int j = 0; j < kPasses; ++j) {
      if (j == piece && (inside >> j & 1) != 0 && k < k_end) prefetch_l2(address(j, k) - piece * 8);
    }
  }
};

template <typename T, int kTokens>
__device__ __forceinline__ void load_tokens(T* stage, const LinearParams& p, int first_token, int k,
                                            int k_end) {
  const int row = threadIdx.x / kPieces;
  const int piece = threadIdx.x % kPieces;
  if (kTokens < kPassRows && row >= kTokens) return;
  const T* from = static_cast<const T*>(p.x) + (first_token + row) * p.x_stride + k + piece * 8;
  T* to = stage_piece(stage, row, piece);
  const bool inside_k = k + piece * 8 < k_end;
#pragma unroll
  for (int j = 0; j < (kTokens + kPassRows - 1) / kPassRows; ++j) {
    const bool copies = inside_k && first_token + row + j * kPassRows < p.n;
    copy_async_16(to + j * kPassRows * kDepth, copies ? from + j * kPassRows * p.x_stride : p.x,
                  copies ? 16 : 0);
  }
}

// One stage: kDepth / 16 steps of mma for this warp's 32 rows and all tokens.
template <typename T, int kTokenTiles>
__device__ __forceinline__ void multiply_stage(float (&sums)[2][kTokenTiles][4], T* weights,
                                               T* tokens) {
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t a[2][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      ldmatrix_x4(a[r], stage_piece(weights, warp * 32 + r * 16 + lane % 16, step * 2 + lane / 16));
    }
    if constexpr (kTokenTiles == 1) {
      uint32_t b[2];
      ldmatrix_x2(b, stage_piece(tokens, lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
      for (int r = 0; r < 2; ++r) mma_16x8x16<T>(sums[r][0], a[r], b);
    } else {
#pragma unroll
      for (int j = 0; j < kTokenTiles; j += 2) {
        uint32_t b[4];
        ldmatrix_x4(b,
                    stage_piece(tokens, j * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
        const uint32_t first[2] = {b[0], b[1]};
        const uint32_t second[2] = {b[2], b[3]};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          mma_16x8x16<T>(sums[r][j], a[r], first);
          mma_16x8x16<T>(sums[r][j + 1], a[r], second);
        }
      }
    }
  }
}

template <typename T, typename Out, int kTokenTiles, bool kSwiglu>
__global__ void __launch_bounds__(kThreads, kBlocks) linear_kernel(const LinearParams p) {
  constexpr int kTokens = kTokenTiles * 8;
  SmemCarver carver;
  T* weights = carver.take<T>(kStages * kTileRows * kDepth);
  T* tokens = carver.take<T>(kStages * kTokens * kDepth);
  SHARED(unsigned, ticket);
  // Groups of tokens that share weights are neighbours, so that the second reads them out of L2.
  const int tile = blockIdx.x / p.groups;
  const int group = blockIdx.x % p.groups;
  const int part = blockIdx.y;
  const int first_token = group * kTokenGroup;
  const int group_tokens = min(p.n - first_token, kTokens);
  const int k_begin = part * p.part_depth;
  const int k_end = min(k_begin + p.part_depth, p.in_features);
  const int stages = (k_end - k_begin + kDepth - 1) / kDepth;
  const WeightCursor<T, kSwiglu> cursor(p, tile);

  dependency_launch();
  // Weights depend on no kernel: they are asked for at once.
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < stages) cursor.load(weights + s * kTileRows * kDepth, p, k_begin + s * kDepth, k_end);
  }
#pragma unroll
  for (int s = kStages - 1; s < kStages - 1 + kPrefetchStages; ++s) {
    cursor.prefetch(k_begin + s * kDepth, k_end);
  }
  dependency_wait();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < stages) {
      load_tokens<T, kTokens>(tokens + s * kTokens * kDepth, p, first_token, k_begin + s * kDepth,
                              k_end);
    }
    copy_async_commit();
  }

  float sums[2][kTokenTiles][4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      sums[r][j][0] = sums[r][j][1] = sums[r][j][2] = sums[r][j][3] = 0.0f;
    }
  }
  for (int s = 0; s < stages; ++s) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the stage is there for all, and all are done with the one that is refilled
    const int next = s + kStages - 1;
    if (next < stages) {
      const int at = next % kStages;
      cursor.load(weights + at * kTileRows * kDepth, p, k_begin + next * kDepth, k_end);
      load_tokens<T, kTokens>(tokens + at * kTokens * kDepth, p, first_token,
                              k_begin + next * kDepth, k_end);
    }
    copy_async_commit();
    multiply_stage<T, kTokenTiles>(sums, weights + s % kStages * kTileRows * kDepth,
                                   tokens + s % kStages * kTokens * kDepth);
  }

  // Through shared memory, so that global memory is written along the outputs.
  copy_async_wait<0>();
  __syncthreads();
  float* finished = reinterpret_cast<float*>(weights);  // [kTokens, kOutPitch]
  static_assert(kTokens * kOutPitch * sizeof(float) <= kStages * kTileRows * kDepth * sizeof(T));
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const int row = threadIdx.x / kWarp * 32 + r * 16 + lane / 4;
      float* at = finished + (j * 8 + lane % 4 * 2) * kOutPitch + row;
      at[0] = sums[r][j][0];
      at[kOutPitch] = sums[r][j][1];
      at[8] = sums[r][j][2];
      at[kOutPitch + 8] = sums[r][j][3];
    }
  }
  __syncthreads();
  const auto from_shared = [&](int token, int row) {
    return *reinterpret_cast<const float4*>(finished + token * kOutPitch + row);
  };
  if (p.parts == 1) {
    store_tile<T, Out, kSwiglu, 4>(p, tile, first_token, group_tokens, from_shared);
    return;
  }

  const int tile_index = blockIdx.x;
  const int64_t part_floats = static_cast<int64_t>(group_tokens) * kTileRows;
  float* tile_partial =
      p.partial + static_cast<int64_t>(tile_index) * p.parts * min(p.n, kTokenGroup) * kTileRows;
  float4* own = reinterpret_cast<float4*>(tile_partial + part * part_floats);
  for (int i = threadIdx.x; i < group_tokens * (kTileRows / 4); i += kThreads) {
    own[i] = from_shared(i / (kTileRows / 4), i % (kTileRows / 4) * 4);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) ticket = atomicAdd(&p.tickets[tile_index], 1u);
  __syncthreads();
  if (ticket + 1 != static_cast<unsigned>(p.parts)) return;
  __threadfence();
  if (threadIdx.x == 0) p.tickets[tile_index] = 0;
  const auto finish = [&](auto most) {
    store_parts<T, Out, kSwiglu, most.value>(p, tile, first_token, group_tokens, tile_partial,
                                             part_floats);
  };
  if (p.parts <= 2) {
    finish(std::integral_constant<int, 2>{});
  } else if (p.parts <= 4) {
    finish(std::integral_constant<int, 4>{});
  } else {
    finish(std::integral_constant<int, kMaxParts>{});
  }
}

template <typename T, int kTokens>
constexpr size_t shared_bytes() {
  return carved_bytes(sizeof(T) * kStages * kTileRows * kDepth) +
         carved_bytes(sizeof(T) * kStages * kTokens * kDepth);
}

template <typename T, typename Out, int kTokenTiles, bool kSwiglu>
void launch_tiles(const LinearParams& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.out_features, kTileOutputs<kSwiglu>) * static_cast<unsigned>(p.groups),
                  static_cast<unsigned>(p.parts));
  launch<linear_kernel<T, Out, kTokenTiles, kSwiglu>>(
      {grid, dim3(kThreads), stream, shared_bytes<T, kTokenTiles * 8>()}, "linear", p);
}

template <typename T, typename Out, bool kSwiglu>
void launch_tokens(const LinearParams& p, cudaStream_t stream) {
  const int tokens = std::min(p.n, kTokenGroup);
  if (tokens <= 8) return launch_tiles<T, Out, 1, kSwiglu>(p, stream);
  if (tokens <= 16) return launch_tiles<T, Out, 2, kSwiglu>(p, stream);
  if (tokens <= 32) return launch_tiles<T, Out, 4, kSwiglu>(p, stream);
  return launch_tiles<T, Out, 8, kSwiglu>(p, stream);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

int64_t tile_count(int64_t out_features, bool swiglu) {
  return ceil_div(out_features, swiglu ? kTileOutputs<true> : kTileOutputs<false>);
}

}  // namespace

LinearSplit split_in_parts(int64_t in_features, int64_t parts) {
  const int64_t depth = (in_features + parts - 1) / parts;
  const int64_t part_depth = (depth + kDepth - 1) / kDepth * kDepth;
  return {static_cast<int>((in_features + part_depth - 1) / part_depth),
          static_cast<int>(part_depth)};
}

LinearSplit split_linear(int64_t out_features, int64_t in_features, bool swiglu,
                         int multiprocessors) {
  // As many parts as give most multiprocessors a block: the memory is then busy everywhere.
  const int64_t tiles = tile_count(out_features, swiglu);
  int64_t parts = 1;
  while (parts < kMaxParts && tiles * parts * 10 < int64_t{multiprocessors} * 9 &&
         in_features / (2 * parts) >= kLeastPartDepth) {
    parts *= 2;
  }
  return split_in_parts(in_features, parts);
}

LinearScratchSize linear_scratch(int64_t n, int64_t out_features, bool swiglu,
                                 const LinearSplit& split) {
  if (split.parts == 1) return {0, 0};
  const int64_t tiles = tile_count(out_features, swiglu) * ceil_div(n, kTokenGroup);
  const int64_t tokens = std::min<int64_t>(n, kTokenGroup);
  return {static_cast<size_t>(tiles * split.parts * tokens * kTileRows),
          static_cast<size_t>(tiles)};
}

LinearScratchSize most_linear_scratch(int64_t n, int multiprocessors) {
  // Parts are doubled only while tiles * parts < 0.9 multiprocessors.
  const int64_t groups = ceil_div(n, kTokenGroup);
  const int64_t tile_parts = groups * (2 * int64_t{multiprocessors} + 1);
  return {static_cast<size_t>(tile_parts * std::min<int64_t>(n, kTokenGroup) * kTileRows),
          static_cast<size_t>(tile_parts)};
}

void linear(const Tensor& out, const Tensor& x, const LinearWeight& w, const LinearWeight* up,
            const Tensor* residual, const LinearSplit& split, const LinearScratch& scratch,
            cudaStream_t stream) {
  if (x.rows == 0) return;
  const char* op = up == nullptr ? "linear" : "linear_swiglu";
  check_rows(op, x);
  FRSPEC_CHECK(w.in_features % 8 == 0 && x.dtype == w.dtype && x.cols == w.in_features &&
                   out.rows == x.rows && out.cols == w.out_features &&
                   (out.dtype == w.dtype || (out.dtype == DType::kF32 && up == nullptr)),
               Error, op, ": out [", out.rows, ", ", out.cols, "] ", dtype_name(out.dtype),
               " does not fit x [", x.rows, ", ", x.cols, "] ", dtype_name(x.dtype),
               " and weight [", w.out_features, ", ", w.in_features, "] ", dtype_name(w.dtype));
  FRSPEC_CHECK(residual == nullptr || (residual->dtype == w.dtype && residual->rows == out.rows &&
                                       residual->cols == out.cols),
               Error, op, ": the residual's shape differs from the output's [", out.rows, ", ",
               out.cols, "]");
  const LinearScratchSize needed = linear_scratch(x.rows, w.out_features, up != nullptr, split);
  FRSPEC_CHECK(
      needed.partial_floats <= scratch.partial_floats && needed.tickets <= scratch.ticket_count,
      Error, op, ": ", needed.partial_floats, " floats and ", needed.tickets,
      " counters of scratch are needed, ", scratch.partial_floats, " and ", scratch.ticket_count,
      " are planned");
  LinearParams p{};
  p.w = w.data;
  p.bias = w.bias;
  p.x = x.data;
  p.x_stride = x.stride;
  p.out = out.data;
  p.out_stride = out.stride;
  p.partial = scratch.partial;
  p.tickets = scratch.tickets;
  p.n = static_cast<int>(x.rows);
  p.out_features = static_cast<int>(w.out_features);
  p.in_features = static_cast<int>(w.in_features);
  p.parts = split.parts;
  p.part_depth = split.part_depth;
  p.groups = static_cast<int>(ceil_div(x.rows, kTokenGroup));
  p.quads = w.out_features % 4 == 0 && out.stride % 4 == 0 && aligned(out.data);
  if (residual != nullptr) {
    p.residual = residual->data;
    p.residual_stride = residual->stride;
    p.quads = p.quads && residual->stride % 4 == 0 && aligned(residual->data);
  }
  if (up != nullptr) {
    p.up = up->data;
    p.up_bias = up->bias;
  }
  with_element(w.dtype, op, [&](auto element) {
    using T = decltype(element);
    if (up != nullptr) return launch_tokens<T, T, true>(p, stream);
    if (out.dtype == DType::kF32) return launch_tokens<T, float, false>(p, stream);
    launch_tokens<T, T, false>(p, stream);
  });
}

}  // namespace frspec::cuda
