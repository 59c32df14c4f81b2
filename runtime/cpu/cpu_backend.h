// The CPU backend: fp32 residual stream, weights packed into panels, a fixed thread pool. What else
// is in fp32, and what in bf16, depends on the instruction set: input_dtype(), kv_dtype().
// The ops are implemented in the files of their names; the arithmetic is in the *_kernel.h files,
// compiled once per instruction set (kernels.h).
#pragma once

#include <chrono>
#include <memory>

#include "backend.h"
#include "cpu/host_memory.h"
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace frspec::cpu {

// Columns that one task of a vocabulary-wide op covers. Fixed, because partial sums are merged by
// chunk: results must not depend on the thread count.
constexpr int64_t kColumnChunk = 16384;
constexpr int64_t column_chunks(int64_t cols) { return (cols + kColumnChunk - 1) / kColumnChunk; }

// Rows at a time for operations on rows: about as many values as are worth another thread.
constexpr int64_t row_grain(int64_t cols) { return cols < 2048 ? 2048 / cols : 1; }

struct TokenLogit {
  float logit;
  int32_t token;
};

// The k best of one chunk of columns, and its part of the softmax sum.
struct TopkChunk {
  float max;
  float sum;  // of exp(logit - max)
  int32_t count;
  TokenLogit best[kMaxTreeTopK];
};

class CpuBackend final : public Backend {
 public:
  CpuBackend(int threads, const Kernels& kernels);

  DeviceInfo info() const override;
  // Verified nodes cost time on a CPU, so the tree is small; docs/cpu.md has the measurement.
  TreeShape default_tree() const override { return {4, 4, 6, 0.08}; }
  DType activation_dtype(DType) const override { return DType::kF32; }
  DType input_dtype(DType weight_dtype) const override {
    return kernels_.rounds_inputs[static_cast<int>(weight_dtype)] ? DType::kBF16 : DType::kF32;
  }
  DType kv_dtype(DType weight_dtype) const override {
    return weight_dtype == DType::kBF16 && kernels_.bf16_attention != nullptr ? DType::kBF16
                                                                              : DType::kF32;
  }
  size_t kv_bytes(const KvLayer& layer) const override;
  int64_t prompt_chunk() const override { return 0; }
  bool host_sees_results() const override { return true; }
  int64_t length_bound(int64_t length) const override { return length; }
  void layout(Arena& arena, const WorkspaceLimits& limits) override;
  void* allocate(size_t bytes) override;
  void upload(void* destination, const void* host_source, size_t bytes) override;
  void download(void* host_destination, const void* source, size_t bytes) override;
  void end_load() override {}

  void run(const WorkKey&, const std::function<void()>& body) override { body(); }
  void post(const void* source, size_t bytes) override;
  const void* mailbox() const override { return mailbox_; }
  void synchronize() override {}
  void mark(int stamp) override;
  double seconds_between(int first, int second) const override;
  double measure_bandwidth() override;

  size_t linear_bytes(DType dtype, int64_t out_features, int64_t in_features) const override;
  void load_linear(const LinearWeight& weight, int64_t first_row,
                   const Tensor& host_source) override;
  void fill_linear(const LinearWeight& weight, uint64_t seed) override;
  void load_vector(float* destination, const Tensor& host_source) override;
  void gather_linear(const LinearWeight& destination, const LinearWeight& source,
                     const int32_t* host_rows) override;

  void embed(const Tensor& out, const LinearWeight& table, const int32_t* tokens) override;
  void rms_norm(const Tensor& out, const Tensor& x, const float* weight, float eps) override;
  void linear(const Tensor& out, const Tensor& x, const LinearWeight& w, Rows rows,
              const Tensor* residual) override;
  void linear_swiglu(const Tensor& out, const Tensor& x, const LinearWeight& gate,
                     const LinearWeight& up, Rows rows) override;
  void add_silu(const Tensor& x, const Tensor& y) override;
  void rope_and_append(const Tensor& qkv, const KvLayer& kv, const Tensor& rope,
                       const int32_t* positions, const int32_t* slots) override;
  void attention(const Tensor& out, const Tensor& q, const KvLayer& kv, const Visible& visible,
                 Rows rows) override;
  void gather_rows(const Tensor& out, const Tensor& src, const int32_t* rows) override;

  void topk_logprobs(float* logprobs, int32_t* tokens, const Tensor& logits,
                     const int32_t* column_tokens, int64_t k) override;
  void choose_tokens(int32_t* tokens, const Tensor& logits, const Sampling* sampling,
                     const int32_t* positions) override;
  void number_rows(int32_t* positions, int32_t* prefix, const int32_t* end, int64_t n) override;
  void expand_beam(const DraftPool& pool, const DraftLevel& level) override;
  void build_tree(const DraftTree& tree, const DraftPool& pool, const TreeRoot& root) override;
  void build_static_tree(const DraftTree& tree, const StaticTree& shape, const int32_t* tokens,
                         const TreeRoot& root) override;
  void walk_tree(const TreeWalk& walk, const DraftTree& tree, const int32_t* chosen) override;
  void plant_tree(const DraftTree& tree, const Plant* plant) override;
  void commit_kv(const KvLayer* layers, int64_t layer_count, const int32_t* base,
                 const int32_t* path, const int32_t* path_length) override;

 private:
  // x as the kernels of w's type read it.
  struct InputRows {
    const void* data;
    int64_t stride;  // in 32-bit units
  };
  InputRows input_rows(const Tensor& x, DType weight_dtype);
  void check_output(const char* op, const Tensor& out) const;
  void check_cache(const char* op, const KvLayer& kv) const;
  template <typename Body>
  void for_panel_runs(int64_t rows, int64_t panels, const Body& body);
  void find_likeliest(const Tensor& logits);
  void sample_all(int32_t* tokens, const Tensor& logits, const Sampling& sampling,
                  const int32_t* positions);
  void sample_filtered(int32_t* tokens, const Tensor& logits, const Sampling& sampling,
                       const int32_t* positions);

  const Kernels& kernels_;
  ThreadPool pool_;
  HostMemory memory_;
  using Clock = std::chrono::steady_clock;
  Clock::time_point marks_[kMarks];
  alignas(64) char mailbox_[kMailboxBytes];

  // Scratch, from layout().
  WorkspaceLimits limits_;
  float* accumulators_ = nullptr;  // [threads, gate and up, panels of a run, rows, P]
  int64_t accumulators_per_thread_ = 0;
  uint16_t* rounded_rows_ = nullptr;               // [rows, in_features]
  float* rows_to_round_ = nullptr;                 // [threads, in_features]
  AttentionScratch* attention_scratch_ = nullptr;  // [threads]
  float* split_partials_ = nullptr;
  int64_t split_partials_size_ = 0;
  TopkChunk* topk_chunks_ = nullptr;     // [kTopkRows, chunks]
  TokenLogit* chosen_chunks_ = nullptr;  // [choice rows, chunks]
  TokenLogit* noisy_chunks_ = nullptr;   // [choice rows, chunks]: scores in place of logits
  TokenLogit* candidates_ = nullptr;     // [threads, V]
};

// kernels: null for the best of this machine. threads: 0 = all that the process may use.
std::unique_ptr<Backend> make_cpu_backend(int threads, const Kernels* kernels = nullptr);

}  // namespace frspec::cpu
