// The CUDA backend: bf16 or fp16 activations and KV cache, weights row-major as they are stored,
// one stream, rounds recorded as CUDA graphs. Ops check their arguments and launch kernels
// (kernels.h).
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <optional>
#include <tuple>

#include "backend.h"
#include "cublas_handle.h"
#include "handles.h"
#include "kernels.h"
#include "memory.h"

namespace frspec::cuda {

// Device memory that the plan may not have: kernels and graphs take it.
constexpr size_t kReserveBytes = size_t{512} << 20;
// What cuBLAS takes for itself: 72.4 MB on an H200, with CUDA 13.0.
constexpr size_t kLibraryBytes = size_t{69} << 20;

class CudaBackend final : public Backend {
 public:
  // DeviceError: no driver, one that is too old, no such device, or one without kernels.
  explicit CudaBackend(int device);
  ~CudaBackend() override;

  DeviceInfo info() const override;
  TreeShape default_tree() const override { return {6, 10, 60}; }  // as in FR-Spec
  DType activation_dtype(DType weight_dtype) const override { return weight_dtype; }
  DType input_dtype(DType weight_dtype) const override { return weight_dtype; }
  DType kv_dtype(DType weight_dtype) const override { return weight_dtype; }
  size_t kv_bytes(const KvLayer& layer) const override {
    return static_cast<size_t>(layer.heads * layer.slots * layer.head_dim) *
           dtype_size(layer.dtype);
  }
  int64_t prompt_chunk() const override { return 512; }
  bool host_sees_results() const override { return false; }
  int64_t length_bound(int64_t length) const override;
  void layout(Arena& arena, const WorkspaceLimits& limits) override;
  void* allocate(size_t bytes) override;
  void upload(void* destination, const void* host_source, size_t bytes) override;
  void download(void* host_destination, const void* source, size_t bytes) override;
  void end_load() override;

  void run(const WorkKey& key, const std::function<void()>& body) override;
  void post(const void* source, size_t bytes) override;
  const void* mailbox() const override { return mailbox_.data(); }
  void synchronize() override;
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
  using GraphKey = std::tuple<int32_t, int32_t, int64_t, bool>;

  // For this thread. Every step begins with a call that does it.
  void choose_device() const;
  // The stream, behind whatever adds the parts of a pending product. What reads or writes
  // activations starts with one of these two.
  cudaStream_t settled();
  // The parts of a pending product that makes `out`, which the caller will add.
  std::optional<LinearParts> take_pending(const Tensor& out);
  // The product of many rows by cuBLAS, with rows up to a multiple of kPromptRowMultiple.
  void multiply_prompt(const Tensor& out, const Tensor& x, const LinearWeight& w,
                       const Tensor* residual);

  int device_;
  cudaDeviceProp properties_{};
  std::unique_ptr<Stream> stream_owner_;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<Event> marks_[kMarks];  // those that were used
  std::unique_ptr<CublasHandle> cublas_;
  DeviceMemory memory_;
  PinnedMemory mailbox_;
  std::unique_ptr<Uploader> uploader_;                 // while loading
  std::map<GraphKey, std::unique_ptr<Graph>> graphs_;  // null: seen, not recorded yet
  bool recording_ = false;

  // Scratch, from layout().
  WorkspaceLimits limits_;
  LinearScratch linear_scratch_{};
  struct PendingProduct {
    Tensor out;
    LinearParts parts;
  };
  std::optional<PendingProduct> pending_;  // the latest product, if its parts are not added yet
  AttentionScratch attention_scratch_{};
  TopkScratch topk_scratch_{};
  ChoiceScratch choice_scratch_{};
  void* gate_scratch_ = nullptr;  // [rows of a prompt, ffn] of 16-bit elements
  size_t gate_scratch_bytes_ = 0;
  void* cublas_workspace_ = nullptr;
};

}  // namespace frspec::cuda
