#include "draft_stages.h"

#include "check.h"

namespace frspec {

void StageMarks::begin(Backend& backend) {
  if (first_stamp_ < 0) return;
  backend_ = &backend;
  count_ = 0;
  backend.mark(first_stamp_);
}

void StageMarks::mark(DraftStage stage) {
  if (first_stamp_ < 0) return;
  const int stamp = first_stamp_ + 1 + count_;
  FRSPEC_CHECK(stamp < Backend::kMarks, Error, "stages of drafting: stamp ", stamp,
               " was asked for, there are ", Backend::kMarks);
  stages_[static_cast<size_t>(count_++)] = stage;
  backend_->mark(stamp);
}

void StageMarks::add_seconds(StageSeconds& seconds) const {
  for (int i = 0; i < count_; ++i) {
    const auto stage = static_cast<size_t>(stages_[static_cast<size_t>(i)]);
    seconds[stage] += backend_->seconds_between(first_stamp_ + i, first_stamp_ + i + 1);
  }
}

}  // namespace frspec
