// The interface over which the forward pass, the drafters and the engine are written once.
//
// Dimension letters used everywhere:
//   n rows of a pass (tokens)      d hidden size          f ffn size (gate and up)
//   H query heads                  K key/value heads      D head dimension
//   V vocabulary                   S sub-vocabulary       L committed length of a sequence
//   C slots of a KV cache          k top-k of drafting
//
// Arguments: outputs first. Every pointer and Tensor points into backend memory (the arena that
// `allocate` gave), unless its comment says host. Activations have `activation_dtype()`,
// or `input_dtype()` where only products read them.
//
// Ops may run later than their call returns, in the order of the calls; download() and
// synchronize() wait for them.
//
// Row invariance (contract 1): for `linear*` and `attention` of Rows::kTarget, `rms_norm`,
// `rope_and_append`, `embed` and `choose_tokens`, a row of the output depends on that row's inputs
// alone, bit for bit: not on n, not on the row's index, not on the thread count or the launch grid.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "arena.h"
#include "draft_tree.h"
#include "plant.h"
#include "sampling.h"
#include "tensor.h"

namespace frspec {

// A matrix [out_features, in_features] in a layout that belongs to the backend (the CPU packs
// panels).
struct LinearWeight {
  void* data = nullptr;
  DType dtype = DType::kBF16;  // kBF16, kF16 or kF32
  int64_t out_features = 0;
  int64_t in_features = 0;
  const float* bias = nullptr;  // [out_features] fp32, or null
};

// What the rows of a pass are, which says how exactly they have to be summed.
enum class Rows : uint8_t {
  kTarget,  // tokens that the target decodes or verifies: rows are invariant
  kPrompt,  // a chunk of a prompt: bits may depend on the chunk (prompt_chunk())
  kDraft,   // the drafter's: their bits decide nothing
};

// Buffers that rows of Rows::kPrompt or kDraft are in have room for as many rows as this divides: a
// backend may compute rows behind the last one.
constexpr int64_t kPromptRowMultiple = 128;

// The slots of a KV cache are a multiple of this, so that a backend may keep them in blocks.
constexpr int64_t kKvSlotMultiple = 128;

// Keys and values of one layer, K heads of C slots of D elements in `dtype`: head-major, so that a
// head streams its slots. The order of elements within a head belongs to the backend.
struct KvLayer {
  void* keys = nullptr;
  void* values = nullptr;
  DType dtype = DType::kF32;
  int64_t heads = 0;     // K
  int64_t slots = 0;     // C, a multiple of kKvSlotMultiple
  int64_t head_dim = 0;  // D
};

// What each row of a pass may attend to: the slots [0, prefix_length[i]), in order, and then, if
// ancestor_words > 0, the slots tree_base + b for every bit b set in the row's ancestor words, in
// order. Bits ascend from the root to the row itself (a parent's index is lower than its child's),
// so the order is the order of logical positions: committed tokens, then the row's ancestors, root
// first.
struct Visible {
  const int32_t* prefix_length = nullptr;  // [n]
  const int32_t* tree_base = nullptr;      // [1]
  const uint64_t* ancestors = nullptr;     // [n, ancestor_words], bit b of word b / 64
  int64_t ancestor_words = 0;
  int64_t max_length = 0;  // host: upper bound of the visible slots of any row
};

// Which work run() is given: the same key, the same ops with the same arguments, except where the
// host sees results and goes on according to them.
struct WorkKey {
  enum Kind : int32_t { kPlainRound, kDraftedRound, kPlantedRound, kObserve } kind;
  int32_t rows;
  int64_t length_bound;
  bool profiled = false;  // with the stamps of draft_stages.h
};

struct DeviceInfo {
  std::string name;         // "cpu" or "cuda:0"
  std::string description;  // e.g. "AMD EPYC, AVX2, 2 threads"
  size_t available_bytes;   // memory that an allocation may still take
};

// The largest sizes that any op will be asked for; a backend plans its scratch memory from them.
struct WorkspaceLimits {
  int64_t rows = 0;          // n of any op
  int64_t round_rows = 0;    // n of passes with ancestors, and of Rows::kTarget
  int64_t choice_rows = 0;   // n of choose_tokens
  int64_t beam_rows = 0;     // n and k of topk_logprobs
  int64_t vocab = 0;         // V
  int64_t visible = 0;       // visible slots of a row
  int64_t query_heads = 0;   // H
  int64_t head_dim = 0;      // D
  int64_t group_heads = 0;   // H / K
  int64_t in_features = 0;   // of any linear
  int64_t out_features = 0;  // of any linear but the head
  int64_t ffn_features = 0;  // f
};

class Backend {
 public:
  virtual ~Backend() = default;

  // ==== Memory and device

  virtual DeviceInfo info() const = 0;
  // What drafts pay on such a device, as far as that can be said without knowing the drafter.
  virtual TreeShape default_tree() const = 0;
  virtual DType activation_dtype(DType weight_dtype) const = 0;
  // Of activations that only products with such weights read: outputs of rms_norm, attention and
  // linear_swiglu may be of this type or of activation_dtype(). Rows begin at multiples of 4 bytes;
  // behind an odd number of columns one more belongs to the ops, which keep a zero in it.
  virtual DType input_dtype(DType weight_dtype) const = 0;
  virtual DType kv_dtype(DType weight_dtype) const = 0;
  // Of a layer's keys, and of its values.
  virtual size_t kv_bytes(const KvLayer& layer) const = 0;

  // 0: prompt rows are as invariant as all others. Else prompts are computed in chunks that begin
  // at multiples of this, and a later prompt may keep whole chunks only: then keys and values are a
  // function of the tokens before them, whatever was computed earlier.
  virtual int64_t prompt_chunk() const = 0;
  // Whether the host may read what an op wrote as soon as the op has returned, and go on according
  // to it. Not where ops are queued, or recorded and replayed.
  virtual bool host_sees_results() const = 0;
  // An upper bound of `length` that takes few values: what is launched for it serves shorter ones.
  virtual int64_t length_bound(int64_t length) const = 0;

  // Takes the backend's scratch memory from the arena. Called before any op, twice like all layout
  // code. ModelError when the backend has no kernel for such sizes.
  virtual void layout(Arena& arena, const WorkspaceLimits& limits) = 0;
  // The one allocation, zero-filled and resident. MemoryPlanError when it cannot be had. Freed with
  // the backend.
  virtual void* allocate(size_t bytes) = 0;
  virtual void upload(void* destination, const void* host_source, size_t bytes) = 0;
  virtual void download(void* host_destination, const void* source, size_t bytes) = 0;
  // No more weights will come: what loading alone needed is given back.
  virtual void end_load() = 0;

  // ==== Repeated work

  // Does `body`, which calls ops (and mark, post) only, or also reads what they wrote where
  // host_sees_results(); any other backend may record it and replay the record at later calls with
  // the same key.
  virtual void run(const WorkKey& key, const std::function<void()>& body) = 0;
  // Copies up to kMailboxBytes to where the host reads them after the next synchronize().
  virtual void post(const void* source, size_t bytes) = 0;
  virtual const void* mailbox() const = 0;
  virtual void synchronize() = 0;
  // Time stamps 0 ... kMarks - 1 among the ops; seconds between two of them, after synchronize().
  virtual void mark(int stamp) = 0;
  virtual double seconds_between(int first, int second) const = 0;
  // Bytes per second that the memory of the weights gives, measured now: reads by all threads on a
  // CPU, a copy (bytes read and written) on a GPU. The floor of a decoding step is measured by it.
  virtual double measure_bandwidth() = 0;
  static constexpr size_t kMailboxBytes = 1024;
  static constexpr int kMarks = 8 + 5 * kMaxTreeDepth;  // of a round, and of each level's stages

  // ==== Weights
  //
  // What is done here is complete at end_load(), and not before: a product may read its weights
  // ahead of what was put on the device last.

  virtual size_t linear_bytes(DType dtype, int64_t out_features, int64_t in_features) const = 0;
  // Places the rows of `host_source` [rows, in_features] (fp32, fp16 or bf16; row-major, host
  // memory) at weight rows first_row ..., converting to weight.dtype (round to nearest even).
  virtual void load_linear(const LinearWeight& weight, int64_t first_row,
                           const Tensor& host_source) = 0;
  // Random elements, uniform with variance 1 / in_features (synthetic.h).
  virtual void fill_linear(const LinearWeight& weight, uint64_t seed) = 0;
  // fp32 vector from a host vector [1, count] of any float dtype.
  virtual void load_vector(float* destination, const Tensor& host_source) = 0;
  // destination row i = source row rows[i]; used once, for the sub-vocabulary head. rows: host
  // memory.
  virtual void gather_linear(const LinearWeight& destination, const LinearWeight& source,
                             const int32_t* host_rows) = 0;

  // ==== Forward pass

  // out [n, d] = rows `tokens` [n] of the table [V, d].
  virtual void embed(const Tensor& out, const LinearWeight& table, const int32_t* tokens) = 0;
  // out [n, d] = x / sqrt(mean(x^2) + eps) * weight [d].
  virtual void rms_norm(const Tensor& out, const Tensor& x, const float* weight, float eps) = 0;
  // out [n, o] = x [n, i] . w [o, i]^T (+ bias) (+ residual [n, o] when not null; may alias out).
  // out is fp32 or of the activations' type.
  virtual void linear(const Tensor& out, const Tensor& x, const LinearWeight& w,
                      Rows rows = Rows::kTarget, const Tensor* residual = nullptr) = 0;
  // out [n, f] = silu(x . gate^T) * (x . up^T).
  virtual void linear_swiglu(const Tensor& out, const Tensor& x, const LinearWeight& gate,
                             const LinearWeight& up, Rows rows = Rows::kTarget) = 0;
  // x [n, d] += silu(y [n, d]).
  virtual void add_silu(const Tensor& x, const Tensor& y) = 0;
  // qkv [n, (H + 2 K) D]: rotates the H query heads in place (halves apart, as Hugging Face lays
  // them out), appends rotated keys and plain values to `kv` at slots [n]. rope [positions, D]: cos
  // in the first D / 2 columns, sin in the rest, for every position; positions [n].
  virtual void rope_and_append(const Tensor& qkv, const KvLayer& kv, const Tensor& rope,
                               const int32_t* positions, const int32_t* slots) = 0;
  // out [n, H D] = softmax(q . keys^T / sqrt(D)) . values, over the visible slots in their order; q
  // [n, H D]. The query heads h of a group share the key/value head h / (H / K).
  virtual void attention(const Tensor& out, const Tensor& q, const KvLayer& kv,
                         const Visible& visible, Rows rows = Rows::kTarget) = 0;
  // out [n, d] = src rows `rows` [n].
  virtual void gather_rows(const Tensor& out, const Tensor& src, const int32_t* rows) = 0;

  // ==== Drafting, choosing, the tree (draft_tree.h, sampling.h)

  // logprobs [n, k] fp32 and tokens [n, k]: the k largest log-softmax values of each row of logits
  // [n, S] (ties: lower column first), columns mapped to token ids by column_tokens [S] (null:
  // identity). NaN counts as -inf; logits of inf have 0, and beside them all others -inf.
  virtual void topk_logprobs(float* logprobs, int32_t* tokens, const Tensor& logits,
                             const int32_t* column_tokens, int64_t k) = 0;
  // tokens [n]: the token that the target writes after each row of logits [n, V] (contract 2).
  // sampling [1]; positions [n]: logical position of each row.
  virtual void choose_tokens(int32_t* tokens, const Tensor& logits, const Sampling* sampling,
                             const int32_t* positions) = 0;
  // The last n positions before *end: positions[i] = *end - n + i, prefix[i] = positions[i] + 1.
  virtual void number_rows(int32_t* positions, int32_t* prefix, const int32_t* end, int64_t n) = 0;
  virtual void expand_beam(const DraftPool& pool, const DraftLevel& level) = 0;
  virtual void build_tree(const DraftTree& tree, const DraftPool& pool, const TreeRoot& root) = 0;
  // tokens: of the candidates that the shape names.
  virtual void build_static_tree(const DraftTree& tree, const StaticTree& shape,
                                 const int32_t* tokens, const TreeRoot& root) = 0;
  virtual void walk_tree(const TreeWalk& walk, const DraftTree& tree, const int32_t* chosen) = 0;
  // Plants recorded tokens into a tree that was just built (plant.h). plant: in backend memory.
  virtual void plant_tree(const DraftTree& tree, const Plant* plant) = 0;
  // For every layer: slot base + j takes the row of slot base + path[j], for j ascending below
  // *path_length (path[j] >= j).
  virtual void commit_kv(const KvLayer* layers, int64_t layer_count, const int32_t* base,
                         const int32_t* path, const int32_t* path_length) = 0;
};

// device: "cpu", "cuda" (the first GPU), "cuda:N", or "auto": a GPU if this build and the machine
// have one, else the CPU. threads: of the CPU, 0 = all that the process may use. RequestError for
// nonsense, DeviceError when absent.
std::unique_ptr<Backend> make_backend(const std::string& device, int threads);

// What this build's CUDA backend was compiled with and for, or "none: " and why there is none.
std::string cuda_build();

}  // namespace frspec
