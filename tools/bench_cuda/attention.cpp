// Attention of one token and of a tree over several contexts.

#include "bench.h"

namespace frspec::cuda::bench {
namespace {

constexpr DType kType = DType::kBF16;
constexpr int64_t kTreeRows = 60;

class AttentionBench {
 public:
  AttentionBench(Bench& bench, int64_t context)
      : bench_(bench), backend_(bench.make_backend()), context_(context) {
    Arena planning;
    layout(planning);
    const size_t bytes = planning.used_bytes();
    Arena arena(backend_->allocate(bytes), bytes);
    layout(arena);
    uint64_t seed = 1;
    fill_random(*backend_, q_, seed);
    for (const KvLayer& copy : copies_) {
      const Tensor all{copy.keys, kType, copy.heads * copy.slots, copy.head_dim, copy.head_dim};
      fill_random(*backend_, all, ++seed);
      fill_random(*backend_, {copy.values, kType, all.rows, all.cols, all.stride}, ++seed);
    }
    const std::vector<int32_t> prefix(kTreeRows, static_cast<int32_t>(context));
    std::vector<uint64_t> ancestors;  // every node below the root's
    for (int64_t row = 0; row < kTreeRows; ++row) {
      ancestors.push_back(uint64_t{1} | uint64_t{1} << row);
    }
    backend_->upload(prefix_, prefix.data(), prefix.size() * sizeof(int32_t));
    backend_->upload(base_, prefix.data(), sizeof(int32_t));
    backend_->upload(ancestors_, ancestors.data(), ancestors.size() * sizeof(uint64_t));
    backend_->end_load();
  }

  json run(int64_t rows) {
    const ModelConfig& config = bench_.target;
    const int64_t width = config.num_heads * config.head_dim;
    const Visible visible{prefix_, base_, ancestors_, 1, backend_->length_bound(context_ + rows)};
    const std::vector<double> seconds =
        medians({sample_backend(*backend_,
                                [&] {
                                  for (const KvLayer& copy : copies_) {
                                    backend_->attention(view(out_, rows, width),
                                                        view(q_, rows, width), copy, visible);
                                  }
                                })},
                bench_.settings.repeats);
    bench_.bandwidths.push_back(backend_->measure_bandwidth());
    return {{"context", context_},
            {"rows", rows},
            {"bytes", 4 * config.num_kv_heads * config.head_dim * (context_ + rows)},
            {"us", seconds[0] * 1e6 / static_cast<double>(copies_.size())}};
  }

 private:
  void layout(Arena& arena) {
    const ModelConfig& config = bench_.target;
    backend_->layout(arena, bench_.limits(kTreeRows, context_ + kTreeRows));
    const int64_t slots =
        (context_ + kTreeRows + kKvSlotMultiple - 1) / kKvSlotMultiple * kKvSlotMultiple;
    const auto bytes = static_cast<size_t>(config.num_kv_heads * slots * config.head_dim) * 2;
    copies_.assign(static_cast<size_t>(bench_.copies(2 * bytes)), {});
    for (KvLayer& copy : copies_) {
      copy = {arena.take("KV cache", bytes),
              arena.take("KV cache", bytes),
              kType,
              config.num_kv_heads,
              slots,
              config.head_dim};
    }
    const int64_t width = config.num_heads * config.head_dim;
    q_ = arena.take_tensor("activations", kType, kTreeRows, width);
    out_ = arena.take_tensor("activations", kType, kTreeRows, width);
    prefix_ = arena.take_array<int32_t>("tree", kTreeRows);
    base_ = arena.take_array<int32_t>("tree", 1);
    ancestors_ = arena.take_array<uint64_t>("tree", kTreeRows);
  }

  Bench& bench_;
  std::unique_ptr<Backend> backend_;
  int64_t context_;
  std::vector<KvLayer> copies_;
  Tensor q_, out_;
  int32_t* prefix_ = nullptr;
  int32_t* base_ = nullptr;
  uint64_t* ancestors_ = nullptr;
};

}  // namespace

json measure_attention(Bench& bench) {
  json rows = json::array();
  for (const int64_t context : bench.settings.contexts) {
    if (context + kTreeRows > bench.target.max_position_embeddings) continue;
    AttentionBench attention(bench, context);
    for (const int64_t n : {int64_t{1}, kTreeRows}) rows.push_back(attention.run(n));
  }
  return rows;
}

}  // namespace frspec::cuda::bench
