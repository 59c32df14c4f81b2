// A level of drafting: what a draft of the whole depth takes beyond one of depth 1, by the levels
// between them. Every level reads fc, the drafter's layer, and the head, once for all rows.
#include <algorithm>
#include <numeric>

#include "bench.h"
#include "eagle.h"

namespace frspec::cuda::bench {
namespace {

constexpr DType kType = DType::kBF16;
constexpr int64_t kContext = 512;
constexpr int64_t kObserved = 64;

struct Draft {
  Eagle eagle;
  DraftTree tree;
};

class DraftBench {
 public:
  explicit DraftBench(Bench& bench) : bench_(bench), backend_(bench.make_backend()) {
    const ModelConfig& config = bench.target;
    target_.config = config;
    std::vector<int32_t> frequent(
        static_cast<size_t>(std::min(bench.settings.sub_vocab, config.vocab_size)));
    std::iota(frequent.begin(), frequent.end(), 0);
    const TreeShape shape = bench.settings.tree;
    for (const auto& sub_vocab : {frequent, std::vector<int32_t>{}}) {
      for (const int depth : {1, shape.depth}) {
        Eagle eagle(bench.settings.drafter, config, sub_vocab, {depth, shape.topk, shape.tokens});
        drafts_.push_back(std::make_unique<Draft>(Draft{std::move(eagle), {}}));
      }
    }
    Arena planning;
    layout(planning);
    const size_t bytes = planning.used_bytes();
    Arena arena(backend_->allocate(bytes), bytes);
    layout(arena);
    std::vector<int32_t> index(kObserved);
    std::iota(index.begin(), index.end(), 0);
    backend_->upload(rows_, index.data(), index.size() * sizeof(int32_t));
    const int32_t root[2] = {7, static_cast<int32_t>(kContext)};
    backend_->upload(root_, root, sizeof(root));
    backend_->end_load();
    const int64_t bound = backend_->length_bound(kContext);
    for (const auto& draft : drafts_) {  // a hidden state to draft from
      draft->eagle.observe(*backend_, features_, rows_, rows_, root_ + 1, kObserved, bound,
                           no_marks_);
    }
    backend_->synchronize();
  }

  json run() {
    const int64_t bound = backend_->length_bound(kContext + bench_.settings.tree.depth + 1);
    std::vector<Sample> samples;
    for (const auto& draft : drafts_) {
      samples.push_back(sample_backend(*backend_, [this, bound, each = draft.get()] {
        each->eagle.draft(*backend_, each->tree, {root_, root_ + 1}, bound, no_marks_);
      }));
    }
    bench_.bandwidths.push_back(backend_->measure_bandwidth());
    const std::vector<double> seconds = medians(samples, bench_.settings.repeats);
    bench_.bandwidths.push_back(backend_->measure_bandwidth());
    json rows = json::array();
    for (size_t i = 0; i < drafts_.size(); i += 2) {
      const int levels = bench_.settings.tree.depth - 1;
      rows.push_back({{"vocab_size", drafts_[i]->eagle.head_width()},
                      {"topk", bench_.settings.tree.topk},
                      {"bytes", level_bytes(drafts_[i]->eagle.head_width())},
                      {"us", (seconds[i + 1] - seconds[i]) * 1e6 / levels},
                      {"draft_us", seconds[i + 1] * 1e6}});
    }
    return rows;
  }

 private:
  void layout(Arena& arena) {
    const ModelConfig& config = bench_.target;
    const TreeShape shape = bench_.settings.tree;
    backend_->layout(
        arena, bench_.limits(kObserved, kContext + kObserved + int64_t{shape.depth} * shape.topk));
    // The drafters use the target's head and embedding alone, and gather their heads from them.
    LinearWeight& head = target_.head;
    head = {
        arena.take("head", backend_->linear_bytes(kType, config.vocab_size, config.hidden_size)),
        kType, config.vocab_size, config.hidden_size, nullptr};
    if (!arena.planning()) backend_->fill_linear(head, 1);
    target_.embedding = head;
    for (const auto& draft : drafts_) {
      draft->eagle.layout(*backend_, arena, target_, kContext, kObserved);
      draft->tree = layout_tree(arena, "tree", draft->eagle.tree_nodes());
    }
    features_ = arena.take_tensor("features", kType, kObserved, config.hidden_size);
    if (!arena.planning()) fill_random(*backend_, features_, 2);
    rows_ = arena.take_array<int32_t>("rows", kObserved);
    root_ = arena.take_array<int32_t>("rows", 2);
  }

  int64_t level_bytes(int64_t head_width) const {
    const ModelConfig& c = bench_.drafter;
    const int64_t q = c.num_heads * c.head_dim;
    const int64_t kv = c.num_kv_heads * c.head_dim;
    const int64_t layer = (2 * q + 2 * kv + 3 * c.intermediate_size) * c.hidden_size;
    return 2 *
           (2 * c.hidden_size * c.hidden_size + c.num_layers * layer + head_width * c.hidden_size);
  }

  Bench& bench_;
  std::unique_ptr<Backend> backend_;
  Llama target_;
  std::vector<std::unique_ptr<Draft>> drafts_;
  StageMarks no_marks_;
  Tensor features_;
  int32_t* rows_ = nullptr;
  int32_t* root_ = nullptr;  // [2]: token, base
};

}  // namespace

json measure_drafting(Bench& bench) {
  FRSPEC_CHECK(bench.settings.tree.depth >= 2, RequestError,
               "a level is timed between two depths: expected a depth of 2 or more, found ",
               bench.settings.tree.depth);
  return DraftBench(bench).run();
}

}  // namespace frspec::cuda::bench
