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
// block makes kTileOutputs outputs for up to 64 tokens from one part of k; each of its warps owns
// 32 rows of weights and all tokens (4 warps), or half of them where there are more than 16 (8
// warps), and sums its whole part of k in ascending order in one chain of mma. (On Hopper, eight
// warps own 16 rows and all tokens each: two warpgroups, which multiply out of shared memory.) A
// stage of the pipeline is 64 values of k of the weights and of x, copied asynchronously into
// shared memory (linear_pipeline.cuh); all stages but one are under way at any time, which is what
// keeps the memory busy. The first weights are asked for before the kernel in front has ended.
//
// The parts of k leave fp32 sums in scratch memory, and the kernel behind the product adds them in
// ascending order: the norm or RoPE that reads the outputs, or add_parts_kernel. Where the parts
// begin depends on the matrix and the device alone, so a row has the same bits whatever rows share
// the product (contract 1).
#include <algorithm>
#include <type_traits>

#include "dispatch.h"
#include "kernels.h"
#include "launch.h"
#include "linear_epilogue.cuh"
#include "linear_params.cuh"
#include "linear_pipeline.cuh"
#include "ptx.cuh"
#include "tensor_map.h"

namespace frspec::cuda {
namespace {

// One stage: kDepth / 16 steps of mma for 32 rows of weights, from first_row on, and kTiles tiles
// of tokens. sums: those of the first 16 rows, then of the others.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply_stage(float (&sums)[2 * kTiles][4], T* weights,
                                               int first_row, T* tokens, int first_token) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t a[2][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      ldmatrix_x4(a[r],
                  weights + stage_place(first_row + r * 16 + lane % 16, step * 2 + lane / 16));
    }
    if constexpr (kTiles == 1) {
      uint32_t b[2];
      ldmatrix_x2(b, tokens + stage_place(first_token + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
      for (int r = 0; r < 2; ++r) mma_16x8x16<T>(sums[r], a[r], b);
    } else {
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, tokens + stage_place(first_token + j * 8 + lane % 8 + lane / 16 * 8,
                                            step * 2 + lane / 8 % 2));
        const uint32_t first[2] = {b[0], b[1]};
        const uint32_t second[2] = {b[2], b[3]};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          mma_16x8x16<T>(sums[r * kTiles + j], a[r], first);
          mma_16x8x16<T>(sums[r * kTiles + j + 1], a[r], second);
        }
      }
    }
  }
}

// The same by a warpgroup, for its 64 rows of weights and all tokens: started, not waited for.
template <typename T, int kTiles>
__device__ __forceinline__ void start_stage(float (&sums)[kTiles][4], T* weights, int first_row,
                                            T* tokens) {
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    wgmma_64xN<T>(sums, weights + first_row * kDepth + k, tokens + k);
  }
  wgmma_commit();
}

template <bool kHopper, typename T, typename Out, int kTokenTiles, bool kSwiglu, int kStages>
__device__ __forceinline__ void multiply_tile(const LinearParams& p, const LinearMaps& maps) {
  constexpr int kTokens = Tiling<kTokenTiles>::kTokens;
  constexpr int kThreads = Tiling<kTokenTiles>::kThreads;
  constexpr int kWarpTiles = Tiling<kTokenTiles>::kWarpTiles;
  constexpr bool kInGroups = kHopper && kThreads == 2 * kWarpgroup;
  SmemCarver carver;
  T* weights = carver.take<T>(kStages * kTileRows * kDepth);
  T* tokens = carver.take<T>(kStages * kTokens * kDepth);
  // Groups of tokens that share weights are neighbours, so that the second reads them out of L2.
  const int tile = blockIdx.x / p.groups;
  const int group = blockIdx.x % p.groups;
  const int part = blockIdx.y;
  const int first_token = group * kTokenGroup;
  const int group_tokens = min(p.n - first_token, kTokens);
  const int k_begin = part * p.part_depth;
  const int k_end = min(k_begin + p.part_depth, p.in_features);
  const int stages = (k_end - k_begin + kDepth - 1) / kDepth;
  using Pipeline = std::conditional_t<kHopper, BulkPipeline<T, kSwiglu, kTokens, kThreads, kStages>,
                                      CopyPipeline<T, kSwiglu, kTokens, kThreads, kStages>>;
  Pipeline pipeline(p, maps, weights, tokens, tile, first_token, k_begin, k_end);

  // Weights depend on no kernel: they are asked for at once. Loops that a block runs through once
  // are not unrolled: their instructions have to come out of memory, too.
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < stages) pipeline.ask_weights(s);
  }
  dependency_wait();
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < stages) pipeline.ask_tokens(s);
    pipeline.asked();
  }
  pipeline.start();

  // Warps that share rows of weights take kWarpTiles tiles of tokens each; a warp of a warpgroup
  // takes 16 rows and all tokens.
  const int warp = threadIdx.x / kWarp;
  const int warp_row = kInGroups ? warp * 16 : warp % kRowWarps * 32;
  const int warp_tile = kInGroups ? 0 : warp / kRowWarps * kWarpTiles;
  constexpr int kSums = 2 * kWarpTiles;
  float sums[kSums][4];
#pragma unroll
  for (int j = 0; j < kSums; ++j) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0.0f;
  int at = 0;                 // the stage's place
  int free_at = kStages - 1;  // and that of the one before it
#pragma unroll 1
  for (int s = 0; s < stages; ++s) {
    pipeline.wait(at);
    if constexpr (kInGroups) {
      wgmma_wait(sums);
    } else if constexpr (kHopper) {
      reads_before_copies();
    }
    __syncthreads();  // the stage is there for all, and all are done with the one that is refilled
    if (s + kStages - 1 < stages) {
      pipeline.ask_weights(free_at);
      pipeline.ask_tokens(free_at);
    }
    pipeline.asked();
    // On Hopper, what comes next may start behind the last copies. Never before dependency_wait():
    // RoPE and attention read what was written before this product (attend_kernel says what).
    if (kHopper && s + kStages >= stages) dependency_launch();
    T* const of_weights = weights + at * kTileRows * kDepth;
    T* const of_tokens = tokens + at * kTokens * kDepth;
    if constexpr (kInGroups) {
      start_stage(sums, of_weights, warp / 4 * 64, of_tokens);
    } else {
      multiply_stage<T, kWarpTiles>(sums, of_weights, warp_row, of_tokens, warp_tile * 8);
    }
    free_at = at;
    at = at + 1 == kStages ? 0 : at + 1;
  }
  if constexpr (kInGroups) wgmma_wait(sums);
  // Not before, and never before dependency_wait(), see above: blocks that only wait take the
  // memory's time from those that stream.
  if (!kHopper) dependency_launch();

  // Through shared memory, so that global memory is written along the outputs.
  if constexpr (!kHopper) copy_async_wait<0>();
  __syncthreads();
  float* finished = reinterpret_cast<float*>(weights);  // [kTokens, kOutPitch]
  static_assert(kTokens * kOutPitch * sizeof(float) <= kStages * kTileRows * kDepth * sizeof(T));
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < kSums; ++j) {
    const int row = warp_row + (kInGroups ? 0 : j / kWarpTiles * 16) + lane / 4;
    const int token = (warp_tile + (kInGroups ? j : j % kWarpTiles)) * 8 + lane % 4 * 2;
    float* to = finished + token * kOutPitch + row;
    to[0] = sums[j][0];
    to[kOutPitch] = sums[j][1];
    to[8] = sums[j][2];
    to[kOutPitch + 8] = sums[j][3];
  }
  __syncthreads();
  const auto from_shared = [&](int token, int row) {
    return *reinterpret_cast<const float4*>(finished + token * kOutPitch + row);
  };
  if (p.parts > 1) {
    constexpr int kRowQuads = kTileRows / 4;
    float* of_part = p.sums + (static_cast<int64_t>(part) * p.n + first_token) * p.width +
                     static_cast<int64_t>(tile) * kTileRows;
#pragma unroll 2
    for (int i = threadIdx.x; i < group_tokens * kRowQuads; i += kThreads) {
      const int token = i / kRowQuads;
      const int row = i % kRowQuads * 4;
      *reinterpret_cast<float4*>(of_part + token * p.width + row) = from_shared(token, row);
    }
    return;
  }
  constexpr int kQuads = kTileOutputs<kSwiglu> / 4;
#pragma unroll 2
  for (int i = threadIdx.x; i < group_tokens * kQuads; i += kThreads) {
    const int token = i / kQuads;
    const int first = tile * kTileOutputs<kSwiglu> + i % kQuads * 4;
    if (first >= p.out_features) continue;
    store_quad<T, Out, kSwiglu>(p, first_token + token, first,
                                [&](int row) { return from_shared(token, row); });
  }
}

template <typename T, typename Out, int kTokenTiles, bool kSwiglu, int kStages>
__global__ void __launch_bounds__(Tiling<kTokenTiles>::kThreads, Tiling<kTokenTiles>::kBlocks)
    linear_kernel(const LinearParams p, const __grid_constant__ LinearMaps maps) {
  if (on_hopper()) {
    multiply_tile<true, T, Out, kTokenTiles, kSwiglu, kStages>(p, maps);
  } else {
    multiply_tile<false, T, Out, kTokenTiles, kSwiglu, kStages>(p, maps);
  }
}

constexpr int kAddThreads = 256;

// The second half of a product of several parts: a thread for four outputs.
template <typename T, typename Out, bool kSwiglu>
__global__ void __launch_bounds__(kAddThreads) add_parts_kernel(const LinearParams p) {
  dependency_launch();
  dependency_wait();
  const int quads = (p.out_features + 3) / 4;
  const int i = blockIdx.x * kAddThreads + threadIdx.x;
  const int token = i / quads;
  if (token >= p.n) return;
  const int first = i % quads * 4;
  const float* tile = p.sums + token * p.width + first / kTileOutputs<kSwiglu> * kTileRows;
  store_quad<T, Out, kSwiglu>(
      p, token, first, [&](int row) { return add_four_parts(tile + row, p.parts, p.n * p.width); });
}

template <typename T, typename Out, bool kSwiglu>
void launch_add(const LinearParams& p, cudaStream_t stream) {
  const unsigned blocks = ceil_div(int64_t{p.n} * ceil_div(p.out_features, 4), kAddThreads);
  launch<add_parts_kernel<T, Out, kSwiglu>>({dim3(blocks), dim3(kAddThreads), stream}, "linear", p);
}

// Whether the grid leaves multiprocessors at most one block, and they have room for long pipelines.
bool wants_deep_stages(const dim3& grid) {
  const auto attribute = [](cudaDeviceAttr which) {
    return static_cast<unsigned>(device_attribute(which, "linear"));
  };
  return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) >= kLeastDeepBytes &&
         grid.x * grid.y <= attribute(cudaDevAttrMultiProcessorCount);
}

// For the kernels of Hopper; empty where they do not run.
template <typename T, bool kSwiglu>
LinearMaps maps_of([[maybe_unused]] const LinearParams& p, [[maybe_unused]] int tokens) {
  LinearMaps maps{};
#if defined(FRSPEC_HOPPER) || defined(FRSPEC_EMULATE_CUDA)
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, "linear") != 9) return maps;
  constexpr DType kType = std::is_same_v<T, bf16> ? DType::kBF16 : DType::kF16;
  const auto weights = [&](const void* matrix) {
    return box_map(matrix, kType, p.out_features, p.in_features, p.in_features, kBoxRows<kSwiglu>);
  };
  maps.w = weights(p.w);
  if (kSwiglu) maps.up = weights(p.up);
  maps.x = box_map(p.x, kType, p.n, p.in_features, p.x_stride, tokens);
#endif
  return maps;
}

template <typename T, typename Out, int kTokenTiles, bool kSwiglu>
void launch_tiles(const LinearParams& p, cudaStream_t stream) {
  constexpr int kTokens = Tiling<kTokenTiles>::kTokens;
  const dim3 grid(ceil_div(p.out_features, kTileOutputs<kSwiglu>) * static_cast<unsigned>(p.groups),
                  static_cast<unsigned>(p.parts));
  const LinearMaps maps = maps_of<T, kSwiglu>(p, kTokens);
  const auto launch_with = [&](auto stages) {
    constexpr size_t kSharedBytes = carved_bytes(sizeof(T) * stages.value * kTileRows * kDepth) +
                                    carved_bytes(sizeof(T) * stages.value * kTokens * kDepth);
    static_assert(stages.value != kStages || kSharedBytes <= kSharedEverywhere);
    launch<linear_kernel<T, Out, kTokenTiles, kSwiglu, stages.value>>(
        {grid, dim3(Tiling<kTokenTiles>::kThreads), stream, kSharedBytes}, "linear", p, maps);
  };
  if (wants_deep_stages(grid)) {
    return launch_with(std::integral_constant<int, kDeepStages<kTokenTiles>>{});
  }
  launch_with(std::integral_constant<int, kStages>{});
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

size_t linear_scratch(int64_t n, int64_t out_features, bool swiglu, const LinearSplit& split) {
  if (split.parts == 1) return 0;
  return static_cast<size_t>(split.parts * n * tile_count(out_features, swiglu) * kTileRows);
}

size_t most_linear_scratch(int64_t n, int multiprocessors) {
  // Parts are doubled only while tiles * parts < 0.9 multiprocessors.
  return static_cast<size_t>(n * (2 * int64_t{multiprocessors} + 1) * kTileRows);
}

namespace {

LinearParams params_of(const Tensor& out, const Tensor* residual) {
  LinearParams p{};
  p.out = out.data;
  p.out_stride = out.stride;
  p.n = static_cast<int>(out.rows);
  p.out_features = static_cast<int>(out.cols);
  p.quads = out.cols % 4 == 0 && out.stride % 4 == 0 && aligned(out.data);
  if (residual != nullptr) {
    p.residual = residual->data;
    p.residual_stride = residual->stride;
    p.quads = p.quads && residual->stride % 4 == 0 && aligned(residual->data);
  }
  return p;
}

// The product itself; the parts are not added.
LinearParams multiply(const Tensor& out, const Tensor& x, const LinearWeight& w,
                      const LinearWeight* up, const Tensor* residual, const LinearSplit& split,
                      const LinearScratch& scratch, cudaStream_t stream) {
  const char* op = up == nullptr ? "linear" : "linear_swiglu";
  check_rows(op, x);
  FRSPEC_CHECK(w.in_features % 8 == 0 && x.dtype == w.dtype && x.cols == w.in_features &&
                   out.rows == x.rows && out.cols == w.out_features &&
                   (out.dtype == w.dtype || (out.dtype == DType::kF32 && up == nullptr)),
               Error, op, ": out [", out.rows, ", ", out.cols, "] ", dtype_name(out.dtype),
               " does not fit x [", x.rows, ", ", x.cols, "] ", dtype_name(x.dtype),
               " and weight [", w.out_features, ", ", w.in_features, "] ", dtype_name(w.dtype));
  FRSPEC_CHECK(up == nullptr || (up->dtype == w.dtype && up->out_features == w.out_features &&
                                 up->in_features == w.in_features),
               Error, op, ": gate and up differ");
  FRSPEC_CHECK(residual == nullptr || (residual->dtype == w.dtype && residual->rows == out.rows &&
                                       residual->cols == out.cols),
               Error, op, ": the residual's shape differs from the output's [", out.rows, ", ",
               out.cols, "]");
  const size_t needed = linear_scratch(x.rows, w.out_features, up != nullptr, split);
  FRSPEC_CHECK(needed <= scratch.floats && split.parts <= kMaxParts, Error, op, ": ", split.parts,
               " parts need ", needed, " floats of scratch, ", scratch.floats, " are planned");
  // Stages do not end where a part ends; only the matrix's end is looked for.
  FRSPEC_CHECK(split.part_depth % kDepth == 0 && split.parts * split.part_depth >= w.in_features,
               Error, op, ": ", split.parts, " parts of ", split.part_depth, " do not make ",
               w.in_features, " of k");
  LinearParams p = params_of(out, residual);
  p.w = w.data;
  p.bias = w.bias;
  p.x = x.data;
  p.x_stride = x.stride;
  p.sums = scratch.sums;
  p.width = tile_count(w.out_features, up != nullptr) * kTileRows;
  p.in_features = static_cast<int>(w.in_features);
  p.parts = split.parts;
  p.part_depth = split.part_depth;
  p.groups = static_cast<int>(ceil_div(x.rows, kTokenGroup));
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
  return p;
}

}  // namespace

void linear(const Tensor& out, const Tensor& x, const LinearWeight& w, const LinearWeight* up,
            const Tensor* residual, const LinearSplit& split, const LinearScratch& scratch,
            cudaStream_t stream) {
  if (x.rows == 0) return;
  const LinearParams p = multiply(out, x, w, up, residual, split, scratch, stream);
  if (split.parts == 1) return;
  with_element(w.dtype, "linear", [&](auto element) {
    using T = decltype(element);
    if (up != nullptr) return launch_add<T, T, true>(p, stream);
    if (out.dtype == DType::kF32) return launch_add<T, float, false>(p, stream);
    launch_add<T, T, false>(p, stream);
  });
}

LinearParts linear_parts(const Tensor& out, const Tensor& x, const LinearWeight& w,
                         const Tensor* residual, const LinearSplit& split,
                         const LinearScratch& scratch, cudaStream_t stream) {
  FRSPEC_CHECK(split.parts > 1 && out.dtype == w.dtype && x.rows > 0, Error,
               "linear_parts: expected several parts of ", dtype_name(w.dtype), " outputs, found ",
               split.parts, " of ", x.rows, " rows of ", dtype_name(out.dtype));
  const LinearParams p = multiply(out, x, w, nullptr, residual, split, scratch, stream);
  return {p.sums, p.n * p.width, p.width, split.parts, w.bias, p.residual, p.residual_stride};
}

void add_parts(const Tensor& out, const LinearParts& parts, cudaStream_t stream) {
  const Tensor residual{const_cast<void*>(parts.residual), out.dtype, out.rows, out.cols,
                        parts.residual_stride};
  LinearParams p = params_of(out, parts.residual == nullptr ? nullptr : &residual);
  p.sums = const_cast<float*>(parts.sums);
  p.width = parts.row_stride;
  p.parts = parts.parts;
  p.bias = parts.bias;
  with_element(out.dtype, "add_parts", [&](auto element) {
    using T = decltype(element);
    launch_add<T, T, false>(p, stream);
  });
}

}  // namespace frspec::cuda
