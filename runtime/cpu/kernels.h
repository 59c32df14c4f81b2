// The kernels of one instruction set, as a table of functions over plain pointers. Each
// kernels_*.cpp compiles the same kernel headers over its own struct Simd and exports one table;
// the CPU's abilities choose the table when the backend is made.
//
// These declarations are shared between translation units that are compiled for different
// instruction sets, so nothing here or in what it includes may be an inline function that is
// called.
#pragma once

#include <cstdint>
#include <vector>

namespace frspec::cpu {

constexpr int64_t kMaxPanel = 32;

// Where a panel of P outputs keeps its elements: those of `group` consecutive k lie together, and
// element (output j, k) is at (k / group) (P group) + column[j] + k % group.
struct PanelLayout {
  int64_t group;
  int64_t column[kMaxPanel];
};

// accumulators[p, r, j] (+)= sum over k ascending of x[r, k] weight[p P + j, k], for every panel p.
struct MultiplyTask {
  const void* weights;  // the first panel
  int64_t panel_bytes;
  int64_t panels;
  const void* x;     // [rows, depth], fp32 or what round_rows made of it
  int64_t x_stride;  // in 32-bit units
  int64_t rows;
  int64_t depth;
  float* accumulators;      // [panels, rows, P]
  bool accumulate = false;  // adds to what the accumulators hold
};

// out[r, j] = accumulators[r, j] (+ bias[j]) (+ residual[r, j]) for j < cols <= P.
struct FinishTask {
  float* out;
  int64_t out_stride;
  const float* accumulators;  // [rows, P]
  int64_t rows;
  int64_t cols;
  const float* bias;      // or null
  const float* residual;  // or null
  int64_t residual_stride;
};

// out[r, j] = silu(gate[r, j] + gate_bias[j]) (up[r, j] + up_bias[j]) for j < cols <= P. out may be
// gate.
struct FinishSwigluTask {
  float* out;
  int64_t out_stride;
  const float* gate;  // [rows, P]
  const float* up;
  int64_t rows;
  int64_t cols;
  const float* gate_bias;  // or null
  const float* up_bias;
};

// Attention works on blocks of logical positions (as many as the cache keeps in a block), and on
// splits of several blocks; both begin at fixed logical positions, so that where a token sits in
// the sum does not depend on anything else.
constexpr int64_t kKvBlock = 128;
constexpr int64_t kAttentionSplit = 512;
constexpr int64_t kKvPanel = 32;  // outputs of a panel of the cache in bf16 (kv_layout.h)
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxAncestors = 256;     // of a row
constexpr int64_t kAttentionQueries = 64;  // query heads of all rows of a task

// Scratch of one thread. What is in bf16 lies by pairs in 32-bit units.
struct AttentionScratch {
  float q[kAttentionQueries * kMaxHeadDim];  // scaled queries [queries, D]
  float scores[kAttentionQueries * kKvBlock];
  float ancestor_scores[kAttentionQueries * kMaxAncestors];
  int32_t ancestor_slots[kAttentionQueries * kMaxAncestors];  // by row
  // Softmax-weighted values of one block; in bf16_attention of the split so far [panels of D,
  // queries, P].
  float block[kAttentionQueries * kMaxHeadDim];
  float split[kAttentionQueries * kMaxHeadDim];  // of one split
  float total[kAttentionQueries * kMaxHeadDim];  // of all
  float block_max[kAttentionQueries], block_sum[kAttentionQueries];
  float split_max[kAttentionQueries], split_sum[kAttentionQueries];
  float total_max[kAttentionQueries], total_sum[kAttentionQueries];
  // For bf16_attention alone.
  float packed[kKvBlock / 2 * kKvPanel / 2];        // values of a row's own positions, by pairs
  float weights[kAttentionQueries * kKvBlock / 2];  // [queries, kKvBlock]
  float factors[kAttentionQueries];                 // what a block leaves of the sums so far
};

// The rows of a tile and the query heads of one key/value head.
struct AttentionTask {
  float* out;  // of the first row and query head
  int64_t out_stride;
  const float* q;
  int64_t q_stride;
  const void* keys;  // of the key/value head (kv_layout.h)
  const void* values;
  const int32_t* prefix_length;  // [rows]
  const uint64_t* ancestors;     // [rows, ancestor_words]
  int64_t ancestor_words;
  int64_t tree_base;
  int64_t rows;
  int64_t heads;  // query heads per key/value head; rows heads <= kAttentionQueries
  int64_t head_dim;
  float scale;
  int64_t first_split;
  int64_t end_split;
  // Null: writes out. Else the one split's result goes to [rows, heads, D + 2] with these strides.
  float* partial;
  int64_t partial_row_stride;
  int64_t partial_head_stride;
  AttentionScratch* scratch;
};

struct Kernels {
  const char* name;
  int64_t panel;           // P, outputs of a panel
  PanelLayout layouts[3];  // by DType: kF32, kF16, kBF16
  bool rounds_inputs[3];   // whether x goes through round_rows first

  void (*multiply[3])(const MultiplyTask& task);
  // out [rows, cols] = x in bf16, rounded to nearest even; of an odd number of columns a zero is
  // written behind the last one, which out_stride has room for.
  void (*round_rows)(uint16_t* out, int64_t out_stride, const float* x, int64_t x_stride,
                     int64_t rows, int64_t cols);
  void (*finish)(const FinishTask& task);
  void (*finish_swiglu)(const FinishSwigluTask& task);

  void (*rms_norm)(float* out, const float* x, const float* weight, int64_t cols, float eps);
  void (*add_silu)(float* x, const float* y, int64_t count);  // x += silu(y)
  // The two halves of a head, rotated: out may be x.
  void (*rotate)(float* out, const float* x, const float* cosines, const float* sines,
                 int64_t half);

  void (*attention)(const AttentionTask& task);
  // The same over a cache in bf16, or null: then caches are in fp32.
  void (*bf16_attention)(const AttentionTask& task);
  // out[D] from the partial results [splits, D + 2] of one query head.
  void (*merge_splits)(float* out, float* partial, int64_t splits, int64_t stride, int64_t head_dim,
                       float* scratch);

  // The largest of x [count] without regard to NaN; -inf if there is none.
  float (*maximum)(const float* x, int64_t count);
  // sum of exp((x - shift) scale), in an order that depends on count alone.
  float (*exp_sum)(const float* x, int64_t count, float shift, float scale);
  // The first index >= begin with x > bound (or x >= bound), or count.
  int64_t (*find_greater)(const float* x, int64_t begin, int64_t count, float bound);
  int64_t (*find_not_less)(const float* x, int64_t begin, int64_t count, float bound);
  // out = exp((x - shift) scale).
  void (*exponentials)(float* out, const float* x, int64_t count, float shift, float scale);
};

// The tables that this CPU can run, best first.
std::vector<const Kernels*> supported_kernels();

// The table for this machine: the best that the CPU can run, or the one that the environment
// variable FRSPEC_CPU_ISA names (portable, avx2, avx512, avx512_bf16). DeviceError if that is
// unknown or beyond the CPU.
const Kernels& choose_kernels();

const Kernels* kernels_portable();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
#endif

}  // namespace frspec::cpu
