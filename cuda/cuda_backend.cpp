#include "cuda_backend.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "launch.h"

namespace frspec::cuda {
namespace {

// More rows than this, and not the target's, go through cuBLAS.
constexpr int64_t kSkinnyRows = 64;
constexpr int64_t kLeastLengthBound = 512;
constexpr int kOldestMajor = 8;

std::string version_text(int version) { return concat(version / 1000, ".", version % 1000 / 10); }

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

void check_device(int device) {
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "asking for the driver's version");
  int runtime = 0;
  check(cudaRuntimeGetVersion(&runtime), "asking for the runtime's version");
  FRSPEC_CHECK(driver != 0, DeviceError, "no NVIDIA driver was found (libcuda.so.1)");
  FRSPEC_CHECK(driver / 1000 >= runtime / 1000, DeviceError, "the NVIDIA driver supports CUDA ",
               version_text(driver), "; this build needs ", runtime / 1000, ".0 or newer");
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice) count = 0;
  if (error != cudaSuccess && error != cudaErrorNoDevice) {
    throw_cuda_error(error, "looking for devices");
  }
  FRSPEC_CHECK(count > 0, DeviceError, "the driver sees no NVIDIA GPU");
  FRSPEC_CHECK(device >= 0 && device < count, DeviceError, "device cuda:", device,
               " was asked for, but the driver sees ", count, " (cuda:0 to cuda:", count - 1, ")");
}

}  // namespace

CudaBackend::CudaBackend(int device) : device_(device) {
  check_device(device);
  check(cudaGetDeviceProperties(&properties_, device), "asking for the device's properties");
  FRSPEC_CHECK(properties_.major >= kOldestMajor, DeviceError, properties_.name,
               " has compute capability ", properties_.major, ".", properties_.minor,
               "; the kernels need ", kOldestMajor, ".0 or newer");
  choose_device();
  check_kernels();
  stream_owner_ = std::make_unique<Stream>();
  stream_ = *stream_owner_;
  mailbox_ = PinnedMemory(kMailboxBytes);
}

CudaBackend::~CudaBackend() {
  cudaSetDevice(device_);
  cudaStreamSynchronize(stream_);
  uploader_.reset();
  graphs_.clear();
  cublas_.reset();
}

// ==== Memory and device

DeviceInfo CudaBackend::info() const {
  size_t free = 0;
  size_t total = 0;
  choose_device();
  check(cudaMemGetInfo(&free, &total), "asking for free memory");
  return {concat("cuda:", device_),
          concat(properties_.name, ", compute capability ", properties_.major, ".",
                 properties_.minor, ", ", properties_.multiProcessorCount, " multiprocessors"),
          free - std::min(free, kReserveBytes)};
}

void CudaBackend::choose_device() const { check(cudaSetDevice(device_), "choosing the device"); }

int64_t CudaBackend::length_bound(int64_t length) const {
  return std::max(kLeastLengthBound,
                  static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(length))));
}

void CudaBackend::layout(Arena& arena, const WorkspaceLimits& limits) {
  limits_ = limits;
  const char* name = "cuda workspace";
  const int64_t skinny_rows = std::max(limits.round_rows, kSkinnyRows);
  const size_t sums = most_linear_scratch(skinny_rows, properties_.multiProcessorCount);
  linear_scratch_ = {arena.take_array<float>(name, sums), sums};

  const int64_t parts = attention_parts(length_bound(limits.visible));
  const auto rows = static_cast<size_t>(parts * limits.round_rows * limits.query_heads);
  const auto row_floats = static_cast<size_t>(padded_head_dim(limits.head_dim));
  attention_scratch_ = {arena.take_array<float>(name, rows * row_floats),
                        arena.take_array<float2>(name, rows), rows};

  const int64_t chunks = topk_chunks(limits.vocab) * limits.beam_rows;
  const auto entries = static_cast<size_t>(chunks * limits.beam_rows);
  topk_scratch_ = {arena.take_array<float2>(name, static_cast<size_t>(chunks)),
                   static_cast<size_t>(chunks), arena.take_array<uint64_t>(name, entries), entries};
  const auto best = static_cast<size_t>(limits.choice_rows * 2 * choice_chunks(limits.vocab));
  choice_scratch_ = {arena.take_array<uint64_t>(name, best), best};

  gate_scratch_bytes_ =
      static_cast<size_t>(round_up(limits.rows, kPromptRowMultiple) * limits.ffn_features) * 2;
  gate_scratch_ = arena.take(name, gate_scratch_bytes_);
  cublas_workspace_ = arena.take("cuBLAS workspace", kCublasWorkspaceBytes);
  arena.plan_beside("cuBLAS itself, about", kLibraryBytes);
  if (arena.planning()) return;
  cublas_.reset();
  cublas_ = std::make_unique<CublasHandle>(stream_, cublas_workspace_);
}

void* CudaBackend::allocate(size_t bytes) {
  choose_device();
  memory_ = DeviceMemory();
  memory_ = DeviceMemory(bytes);
  check(cudaMemsetAsync(memory_.data(), 0, bytes, stream_), "clearing device memory");
  uploader_ = std::make_unique<Uploader>(stream_);
  return memory_.data();
}

void CudaBackend::upload(void* destination, const void* host_source, size_t bytes) {
  choose_device();
  check(cudaMemcpyAsync(destination, host_source, bytes, cudaMemcpyHostToDevice, settled()),
        "uploading");
}

void CudaBackend::download(void* host_destination, const void* source, size_t bytes) {
  choose_device();
  check(cudaMemcpyAsync(host_destination, source, bytes, cudaMemcpyDeviceToHost, settled()),
        "downloading");
  synchronize();
}

void CudaBackend::end_load() {
  synchronize();
  uploader_.reset();
}

// ==== Repeated work

void CudaBackend::run(const WorkKey& key, const std::function<void()>& body) {
  choose_device();
  pending_.reset();  // of work that failed
  const GraphKey graph_key{key.kind, key.rows, key.length_bound, key.profiled};
  auto found = graphs_.find(graph_key);
  // The first time nothing is recorded: kernels are loaded by their first launch, which must not be
  // in a recording.
  const auto settled_body = [&] {
    body();
    settled();
  };
  if (found == graphs_.end()) {
    settled_body();
    graphs_[graph_key] = nullptr;
    return;
  }
  if (found->second == nullptr) {
    recording_ = true;
    try {
      found->second = std::make_unique<Graph>(stream_, settled_body);
    } catch (...) {
      recording_ = false;
      throw;
    }
    recording_ = false;
  }
  found->second->launch(stream_);
}

void CudaBackend::post(const void* source, size_t bytes) {
  FRSPEC_CHECK(bytes <= kMailboxBytes, Error, "post: ", bytes, " bytes, at most ", kMailboxBytes,
               " are possible");
  check(cudaMemcpyAsync(mailbox_.data(), source, bytes, cudaMemcpyDeviceToHost, settled()),
        "posting results");
}

void CudaBackend::synchronize() {
  choose_device();
  check(cudaStreamSynchronize(stream_), "waiting for the device");
}

void CudaBackend::mark(int stamp) {
  choose_device();
  if (marks_[stamp] == nullptr) marks_[stamp] = std::make_unique<Event>();
  // Behind the parts of a product: they belong to the stage that made it.
  check(cudaEventRecordWithFlags(*marks_[stamp], settled(),
                                 recording_ ? cudaEventRecordExternal : cudaEventRecordDefault),
        "recording a time stamp");
}

double CudaBackend::seconds_between(int first, int second) const {
  FRSPEC_CHECK(marks_[first] != nullptr && marks_[second] != nullptr, Error, "time stamps ", first,
               " and ", second, " were asked for, but not both are marked");
  float milliseconds = 0.0f;
  check(cudaEventElapsedTime(&milliseconds, *marks_[first], *marks_[second]),
        "reading time stamps");
  return static_cast<double>(milliseconds) * 1e-3;
}

double CudaBackend::measure_bandwidth() {
  constexpr size_t kMostBytes = size_t{1} << 30;
  constexpr int kCopies = 10;
  size_t free = 0;
  size_t total = 0;
  choose_device();
  check(cudaMemGetInfo(&free, &total), "asking for free memory");
  const size_t bytes = std::min(kMostBytes, free / 4) / 4096 * 4096;
  const DeviceMemory from(bytes);
  const DeviceMemory to(bytes);
  const Event start;
  const Event end;
  for (int copy = -1; copy < kCopies; ++copy) {  // the first is not timed
    if (copy == 0) check(cudaEventRecord(start, stream_), "measuring bandwidth");
    check(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream_),
          "measuring bandwidth");
  }
  check(cudaEventRecord(end, stream_), "measuring bandwidth");
  synchronize();
  float milliseconds = 0.0f;
  check(cudaEventElapsedTime(&milliseconds, start, end), "measuring bandwidth");
  return 2.0 * kCopies * static_cast<double>(bytes) / (static_cast<double>(milliseconds) * 1e-3);
}

// ==== Weights

size_t CudaBackend::linear_bytes(DType dtype, int64_t out_features, int64_t in_features) const {
  FRSPEC_CHECK(dtype == DType::kBF16 || dtype == DType::kF16, ModelError,
               "CUDA keeps weights in bf16 or fp16, found ", dtype_name(dtype),
               "; choose with dtype='bf16' or dtype='fp16'");
  FRSPEC_CHECK(in_features % 8 == 0, ModelError,
               "CUDA needs matrix rows in multiples of 8 elements, found a matrix [", out_features,
               ", ", in_features, "]");
  return static_cast<size_t>(out_features * in_features) * dtype_size(dtype);
}

void CudaBackend::load_linear(const LinearWeight& weight, int64_t first_row,
                              const Tensor& host_source) {
  FRSPEC_CHECK(host_source.cols == weight.in_features && first_row >= 0 &&
                   first_row + host_source.rows <= weight.out_features && uploader_ != nullptr,
               Error, "load_linear: source [", host_source.rows, ", ", host_source.cols,
               "] at row ", first_row, " does not fit weight [", weight.out_features, ", ",
               weight.in_features, "]");
  char* destination =
      static_cast<char*>(weight.data) +
      first_row * weight.in_features * static_cast<int64_t>(dtype_size(weight.dtype));
  uploader_->upload(destination, weight.dtype, host_source);
}

void CudaBackend::fill_linear(const LinearWeight& weight, uint64_t seed) {
  const Tensor rows{weight.data, weight.dtype, weight.out_features, weight.in_features,
                    weight.in_features};
  fill_random(rows, seed, stream_);
}

void CudaBackend::load_vector(float* destination, const Tensor& host_source) {
  FRSPEC_CHECK(host_source.rows == 1 && uploader_ != nullptr, Error,
               "load_vector: expected a vector, found [", host_source.rows, ", ", host_source.cols,
               "]");
  uploader_->upload(destination, DType::kF32, host_source);
}

void CudaBackend::gather_linear(const LinearWeight& destination, const LinearWeight& source,
                                const int32_t* host_rows) {
  const auto count = static_cast<size_t>(destination.out_features);
  FRSPEC_CHECK(destination.dtype == source.dtype && destination.in_features == source.in_features &&
                   count <= linear_scratch_.floats,
               Error, "gather_linear: ", destination.out_features, " rows of ",
               destination.in_features, " do not come from ", source.in_features);
  for (int64_t i = 0; i < destination.out_features; ++i) {
    FRSPEC_CHECK(host_rows[i] >= 0 && host_rows[i] < source.out_features, Error,
                 "gather_linear: row ", host_rows[i], " is outside [0, ", source.out_features, ")");
  }
  // The row numbers wait in scratch memory, which no product uses while loading.
  auto* rows = reinterpret_cast<int32_t*>(linear_scratch_.sums);
  upload(rows, host_rows, count * sizeof(int32_t));
  const Tensor out{destination.data, destination.dtype, destination.out_features,
                   destination.in_features, destination.in_features};
  copy_rows(out, source.data, source.in_features, source.out_features, rows, stream_);
}

// ==== Forward pass

cudaStream_t CudaBackend::settled() {
  if (pending_) {
    const PendingProduct product = *std::exchange(pending_, std::nullopt);
    add_parts(product.out, product.parts, stream_);
  }
  return stream_;
}

std::optional<LinearParts> CudaBackend::take_pending(const Tensor& out) {
  if (!pending_ || pending_->out.data != out.data || pending_->out.rows != out.rows ||
      pending_->out.cols != out.cols || pending_->out.stride != out.stride) {
    return std::nullopt;
  }
  return std::exchange(pending_, std::nullopt)->parts;
}

void CudaBackend::embed(const Tensor& out, const LinearWeight& table, const int32_t* tokens) {
  FRSPEC_CHECK(out.cols == table.in_features && out.dtype == table.dtype, Error, "embed: out has ",
               out.cols, " columns, the table ", table.in_features);
  copy_rows(out, table.data, table.in_features, table.out_features, tokens, settled());
}

void CudaBackend::gather_rows(const Tensor& out, const Tensor& src, const int32_t* rows) {
  FRSPEC_CHECK(out.cols == src.cols && out.dtype == src.dtype, Error, "gather_rows: out has ",
               out.cols, " columns, the source ", src.cols);
  copy_rows(out, src.data, src.stride, src.rows, rows, settled());
}

void CudaBackend::rms_norm(const Tensor& out, const Tensor& x, const float* weight, float eps) {
  const std::optional<LinearParts> parts = take_pending(x);
  cuda::rms_norm(out, x, weight, eps, parts ? &*parts : nullptr, settled());
}

void CudaBackend::linear(const Tensor& out, const Tensor& x, const LinearWeight& w, Rows rows,
                         const Tensor* residual) {
  if (rows != Rows::kTarget && x.rows > kSkinnyRows) return multiply_prompt(out, x, w, residual);
  const LinearSplit split =
      split_linear(w.out_features, w.in_features, false, properties_.multiProcessorCount);
  if (split.parts == 1 || out.dtype != w.dtype || x.rows == 0) {
    return cuda::linear(out, x, w, nullptr, residual, split, linear_scratch_, settled());
  }
  const LinearParts parts = linear_parts(out, x, w, residual, split, linear_scratch_, settled());
  pending_ = {out, parts};
}

void CudaBackend::linear_swiglu(const Tensor& out, const Tensor& x, const LinearWeight& gate,
                                const LinearWeight& up, Rows rows) {
  FRSPEC_CHECK(gate.dtype == up.dtype && gate.out_features == up.out_features &&
                   gate.in_features == up.in_features,
               Error, "linear_swiglu: gate and up differ");
  if (rows != Rows::kTarget && x.rows > kSkinnyRows) {
    const Tensor gates{gate_scratch_, out.dtype, out.rows, out.cols, out.cols};
    FRSPEC_CHECK(static_cast<size_t>(round_up(out.rows, kPromptRowMultiple) * out.cols) *
                         dtype_size(out.dtype) <=
                     gate_scratch_bytes_,
                 Error, "linear_swiglu: [", out.rows, ", ", out.cols,
                 "] exceeds the planned workspace");
    multiply_prompt(gates, x, gate, nullptr);
    multiply_prompt(out, x, up, nullptr);
    return multiply_silu(out, gates, settled());
  }
  const LinearSplit split =
      split_linear(gate.out_features, gate.in_features, true, properties_.multiProcessorCount);
  cuda::linear(out, x, gate, &up, nullptr, split, linear_scratch_, settled());
}

void CudaBackend::add_silu(const Tensor& x, const Tensor& y) { cuda::add_silu(x, y, settled()); }

void CudaBackend::multiply_prompt(const Tensor& out, const Tensor& x, const LinearWeight& w,
                                  const Tensor* residual) {
  FRSPEC_CHECK(out.dtype == w.dtype && x.dtype == w.dtype, Error, "linear: prompt rows must be ",
               dtype_name(w.dtype));
  settled();
  // cuBLAS adds to what is there: the residual, if it is not the output itself, and the bias.
  const bool in_place = residual != nullptr && residual->data == out.data;
  const bool fills = w.bias != nullptr || (residual != nullptr && !in_place);
  if (fills) fill_rows(out, w.bias, residual, settled());
  // cuBLAS chooses how to sum by the number of rows: few different numbers occur.
  const auto padded = [](const Tensor& rows) {
    Tensor whole = rows;
    whole.rows = round_up(rows.rows, kPromptRowMultiple);
    return whole;
  };
  cublas_->multiply(padded(out), padded(x), w.data, fills || in_place ? 1.0f : 0.0f);
}

void CudaBackend::rope_and_append(const Tensor& qkv, const KvLayer& kv, const Tensor& rope,
                                  const int32_t* positions, const int32_t* slots) {
  const std::optional<LinearParts> parts = take_pending(qkv);
  cuda::rope_and_append(qkv, kv, rope, positions, slots, parts ? &*parts : nullptr, settled());
}

void CudaBackend::attention(const Tensor& out, const Tensor& q, const KvLayer& kv,
                            const Visible& visible, Rows rows) {
  // Few rows are faster by ranges, but a prompt's bits must not depend on what a round's size is.
  const bool prompt =
      rows == Rows::kPrompt || (rows == Rows::kDraft && q.rows > limits_.round_rows);
  cuda::attention(out, q, kv, visible, prompt, attention_scratch_,
                  {properties_.multiProcessorCount, properties_.sharedMemPerBlockOptin}, settled());
}

// ==== Drafting, choosing, the tree

void CudaBackend::topk_logprobs(float* logprobs, int32_t* tokens, const Tensor& logits,
                                const int32_t* column_tokens, int64_t k) {
  cuda::topk_logprobs(logprobs, tokens, logits, column_tokens, k, topk_scratch_, settled());
}

void CudaBackend::choose_tokens(int32_t* tokens, const Tensor& logits, const Sampling* sampling,
                                const int32_t* positions) {
  cuda::choose_tokens(tokens, logits, sampling, positions, choice_scratch_, settled());
}

void CudaBackend::number_rows(int32_t* positions, int32_t* prefix, const int32_t* end, int64_t n) {
  cuda::number_rows(positions, prefix, end, n, settled());
}

void CudaBackend::expand_beam(const DraftPool& pool, const DraftLevel& level) {
  cuda::expand_beam(pool, level, settled());
}

void CudaBackend::build_tree(const DraftTree& tree, const DraftPool& pool, const TreeRoot& root) {
  cuda::build_tree(tree, pool, root, settled());
}

void CudaBackend::build_static_tree(const DraftTree& tree, const StaticTree& shape,
                                    const int32_t* tokens, const TreeRoot& root) {
  cuda::build_static_tree(tree, shape, tokens, root, settled());
}

void CudaBackend::walk_tree(const TreeWalk& walk, const DraftTree& tree, const int32_t* chosen) {
  cuda::walk_tree(walk, tree, chosen, settled());
}

void CudaBackend::plant_tree(const DraftTree& tree, const Plant* plant) {
  cuda::plant_tree(tree, plant, settled());
}

void CudaBackend::commit_kv(const KvLayer* layers, int64_t layer_count, const int32_t* base,
                            const int32_t* path, const int32_t* path_length) {
  cuda::commit_kv(layers, layer_count, base, path, path_length, settled());
}

}  // namespace frspec::cuda

namespace frspec {

std::unique_ptr<Backend> make_cuda_backend(int device) {
  return std::make_unique<cuda::CudaBackend>(device);
}

std::string cuda_build() { return FRSPEC_CUDA_BUILD; }

}  // namespace frspec
