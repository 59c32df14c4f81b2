// Where the time of drafting goes (arXiv 2502.14856, figure 6): drafters leave a time stamp behind
// the ops of each stage, when the request asks for it.
#pragma once

#include <array>
#include <cstdint>

#include "backend.h"

namespace frspec {

enum class DraftStage : uint8_t {
  kEmbedding,  // EAGLE's input: embedding and feature, and their product with fc
  kLayers,     // EAGLE's decoder layers, Medusa's residual blocks
  kHead,       // logits
  kTopk,       // softmax and top-k
  kTree,       // growing the beam, building the tree
};
constexpr size_t kDraftStages = 5;

using StageSeconds = std::array<double, kDraftStages>;  // by DraftStage

// The stamps of one observe() or draft(). Which stage each of them ends is the same every time
// where a backend replays what was marked once.
class StageMarks {
 public:
  StageMarks() = default;  // leaves no stamps
  explicit StageMarks(int first_stamp) : first_stamp_(first_stamp) {}

  // The first stage begins behind the ops of `backend` so far.
  void begin(Backend& backend);
  // The ops since the last mark were of this stage.
  void mark(DraftStage stage);

  // Adds the time of each stage, after Backend::synchronize().
  void add_seconds(StageSeconds& seconds) const;

 private:
  int first_stamp_ = -1;
  Backend* backend_ = nullptr;
  int count_ = 0;
  std::array<DraftStage, Backend::kMarks>
      stages_{};  // [count_], each ended by first_stamp_ + 1 + i
};

}  // namespace frspec
