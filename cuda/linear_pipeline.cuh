// How the stages of a product (linear.cu) get into shared memory: copied by all threads, or on
// Hopper as boxes that one thread asks for. Both are used alike, by all threads, for stages in
// ascending order; `place` is the stage's, 0 ... kStages - 1:
//
//   ask_weights(place), ask_tokens(place)   the next stage's, which the place is free for
//   asked()                                 after both of a stage
//   start()                                 once, when the first stages are asked for
//   wait(place)                             what this thread has to wait for, of the next stage; it
//                                           is there for all behind a __syncthreads()
#pragma once

#include "hopper.cuh"
#include "linear_params.cuh"
#include "ptx.cuh"

namespace frspec::cuda {
namespace {

// Where piece `piece` of a row of a stage is; the swizzle keeps ldmatrix free of bank conflicts.
__device__ __forceinline__ int stage_place(int row, int piece) {
  return row * kDepth + ((piece ^ (row & 7)) << 3);
}

// Rows of a stage that all threads of a block copy at once, a piece each.
template <int kThreads>
constexpr int kPassRows = kThreads / kPieces;

// Passes over kRows rows each in which a thread that has the first of `rows` rows has one.
template <int kRows>
__device__ __forceinline__ int passes_inside(int rows) {
  return (rows + kRows - 1) / kRows;
}

// What one thread copies of each stage of the weights: the same piece of tile rows row +
// kPassRows * j. Of a swiglu tile every 32 rows are 16 gate rows and the 16 up rows of the same
// outputs: passes of 16 rows alternate between the matrices, and of a pass of 32 a thread copies
// the row of one matrix. Addresses advance from stage to stage: computing them again takes more
// instructions than all else in the loop.
template <typename T, bool kSwiglu, int kThreads>
struct WeightCursor {
  static constexpr int kRows = kPassRows<kThreads>;
  static constexpr int kPasses = kTileRows / kRows;
  static constexpr bool kAlternates = kSwiglu && kRows == 16;
  static constexpr int kMatrixRows = kSwiglu ? 16 : kRows;  // of a pass, of one matrix
  static_assert(kRows == 16 || kRows == 32, "the rows of a thread are of one matrix in each pass");
  const T* from;  // the thread's first row, at its piece of the next stage
  const T* up;    // passes alternate: the same of the other matrix
  int64_t step;   // to the row of the next pass of the matrix
  int passes;     // that have a row of the matrix
  int left;       // k from the piece to the end of the part
  int place;      // of the first row's piece in a stage

  __device__ __forceinline__ WeightCursor(const LinearParams& p, int tile, int k_begin, int k_end)
      : step(int64_t{kMatrixRows} * p.in_features) {
    const int row = threadIdx.x / kPieces;
    const int piece = threadIdx.x % kPieces;
    const int first = tile * kTileOutputs<kSwiglu> + row % kMatrixRows;
    const int64_t at = static_cast<int64_t>(first) * p.in_features + k_begin + piece * 8;
    from = static_cast<const T*>(kSwiglu && row >= kMatrixRows ? p.up : p.w) + at;
    up = kAlternates ? static_cast<const T*>(p.up) + at : nullptr;
    passes = passes_inside<kMatrixRows>(p.out_features - first);
    left = k_end - k_begin - piece * 8;
    place = stage_place(row, piece);
  }

  // What is not inside becomes zeros, and is not read.
  __device__ __forceinline__ void load_next(T* stage) {
    T* const to = stage + place;
    const int copied = left > 0 ? passes : 0;
    const T* row = from;
    const T* up_row = up;
#pragma unroll
    for (int j = 0; j < kPasses; ++j) {
      const bool of_up = kAlternates && j % 2 == 1;
      const int matrix_pass = kAlternates ? j / 2 : j;
      copy_async_16(to + j * kRows * kDepth, of_up ? up_row : row, matrix_pass < copied ? 16 : 0);
      (of_up ? up_row : row) += step;
    }
    from += kDepth;
    if (kAlternates) up += kDepth;
    left -= kDepth;
  }
};

// The same of the tokens.
template <typename T, int kTokens, int kThreads>
struct TokenCursor {
  static constexpr int kRows = kPassRows<kThreads>;
  static constexpr int kPasses = (kTokens + kRows - 1) / kRows;
  const T* from;
  int64_t step;
  int passes;
  int left;
  int place;

  __device__ __forceinline__ TokenCursor(const LinearParams& p, int first_token, int k_begin,
                                         int k_end)
      : step(kRows * p.x_stride) {
    const int row = threadIdx.x / kPieces;
    const int piece = threadIdx.x % kPieces;
    from = static_cast<const T*>(p.x) + (first_token + row) * p.x_stride + k_begin + piece * 8;
    passes = passes_inside<kRows>(p.n - first_token - row);
    left = k_end - k_begin - piece * 8;
    place = stage_place(row, piece);
  }

  __device__ __forceinline__ void load_next(T* stage) {
    if (kTokens < kRows && threadIdx.x / kPieces >= kTokens) return;
    const int copied = left > 0 ? passes : 0;
    const T* row = from;
#pragma unroll
    for (int j = 0; j < kPasses; ++j) {
      copy_async_16(stage + place + j * kRows * kDepth, row, j < copied ? 16 : 0);
      row += step;
    }
    from += kDepth;
    left -= kDepth;
  }
};

template <typename T, bool kSwiglu, int kTokens, int kThreads, int kStages>
class CopyPipeline {
 public:
  __device__ __forceinline__ CopyPipeline(const LinearParams& p, const LinearMaps&, T* weights,
                                          T* tokens, int tile, int first_token, int k_begin,
                                          int k_end)
      : weights_(weights),
        tokens_(tokens),
        weight_cursor_(p, tile, k_begin, k_end),
        token_cursor_(p, first_token, k_begin, k_end) {}
  __device__ __forceinline__ void ask_weights(int place) {
    weight_cursor_.load_next(weights_ + place * kTileRows * kDepth);
  }
  __device__ __forceinline__ void ask_tokens(int place) {
    token_cursor_.load_next(tokens_ + place * kTokens * kDepth);
  }
  __device__ __forceinline__ void asked() { copy_async_commit(); }
  __device__ __forceinline__ void start() {}
  __device__ __forceinline__ void wait(int) { copy_async_wait<kStages - 2>(); }

 private:
  T* weights_;
  T* tokens_;
  WeightCursor<T, kSwiglu, kThreads> weight_cursor_;
  TokenCursor<T, kTokens, kThreads> token_cursor_;
};

// Rows of a box of weights: all of a tile, or gate and up rows in turn.
template <bool kSwiglu>
constexpr int kBoxRows = kSwiglu ? 16 : kTileRows;

// Boxes that reach behind the matrix are filled up with zeros.
template <typename T, bool kSwiglu, int kTokens, int kThreads, int kStages>
class BulkPipeline {
 public:
  __device__ __forceinline__ BulkPipeline(const LinearParams&, const LinearMaps& maps, T* weights,
                                          T* tokens, int tile, int first_token, int k_begin, int)
      : maps_(maps),
        weights_(weights),
        tokens_(tokens),
        row_(tile * kTileOutputs<kSwiglu>),
        token_(first_token),
        weights_k_(k_begin),
        tokens_k_(k_begin) {
    SHARED(uint64_t, barriers, [kStages]);
    barriers_ = barriers;
    if (!asks()) return;
    for (int place = 0; place < kStages; ++place) barrier_init(barriers_ + place);
    barrier_inits_done();
    prefetch_map(maps_.x);
  }
  __device__ __forceinline__ void ask_weights(int place) {
    if (asks()) {
      uint64_t* const barrier = barriers_ + place;
      barrier_arrive_expecting(barrier, (kTileRows + kTokens) * kDepth * sizeof(T));
      T* to = weights_ + place * kTileRows * kDepth;
      constexpr int kBox = kBoxRows<kSwiglu> * kDepth;
#pragma unroll
      for (int row = 0; row < kTileOutputs<kSwiglu>; row += kBoxRows<kSwiglu>) {
        copy_box_async(to, maps_.w, weights_k_, row_ + row, barrier);
        to += kBox;
        if (!kSwiglu) continue;
        copy_box_async(to, maps_.up, weights_k_, row_ + row, barrier);
        to += kBox;
      }
    }
    weights_k_ += kDepth;
  }
  __device__ __forceinline__ void ask_tokens(int place) {
    if (asks()) {
      copy_box_async(tokens_ + place * kTokens * kDepth, maps_.x, tokens_k_, token_,
                     barriers_ + place);
    }
    tokens_k_ += kDepth;
  }
  __device__ __forceinline__ void asked() { __syncwarp(); }  // behind what one thread did
  // The barriers are initialised for all.
  __device__ __forceinline__ void start() { __syncthreads(); }
  __device__ __forceinline__ void wait(int place) {
    barrier_wait(barriers_ + place, parity_);
    __syncwarp();  // for what a warp has to do together
    if (place == kStages - 1) parity_ ^= 1;
  }

 private:
  // In one thread, which must be found again right where it asks (elected() says why).
  __device__ __forceinline__ bool asks() const { return threadIdx.x / kWarp == 0 && elected(); }

  const LinearMaps& maps_;
  T* weights_;
  T* tokens_;
  uint64_t* barriers_;
  int row_;
  int token_;
  int weights_k_;
  int tokens_k_;
  uint32_t parity_ = 0;
};

}  // namespace
}  // namespace frspec::cuda
