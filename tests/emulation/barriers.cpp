// Where threads meet: block barriers and warp collectives, and the checks that they meet in the
// same place.
#include <cstring>
#include <string>

#include "sanitizers.h"
#include "thread_block.h"

namespace emulation {
namespace {

void check_same_barrier(Fiber& self, Vote vote, const Site& site) {
  Block& block = *self.block;
  if (block.barrier_vote == vote && same_line(block.barrier_site, site)) return;
  stop_running(self, Waiting::kBlock);
  abandon_block(self, describe(block, &self) + "threads of one block meet at different barriers:" +
                          describe_threads(block));
}

void complete_barrier(Block& block, Vote vote) {
  block.barrier_result =
      vote == Vote::kAny ? block.barrier_votes != 0 ? 1 : 0
      : vote == Vote::kAll
          ? block.barrier_votes == static_cast<int>(block.threads) ? 1 : 0
          : block.barrier_votes;
  block.at_barrier = 0;
  ++block.barriers_passed;
  for (uint32_t w = 0; w < block.warp_count; ++w) make_runnable(block, w, block.warps[w].existing);
}

void check_same_collective(Fiber& self, uint32_t mask, CollectiveWork work, const Site& site) {
  Block& block = *self.block;
  const Warp& warp = block.warps[self.warp];
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const auto lane = static_cast<uint32_t>(std::countr_zero(left));
    const Fiber& other = *block.fibers[self.warp * kWarpThreads + lane];
    if (warp.masks[lane] == mask && warp.works[lane] == work && same_line(other.site, site)) {
      continue;
    }
    stop_running(self, Waiting::kWarp);
    abandon_block(self, describe(block, &self) +
                            "lanes of one warp meet at different collectives or with different "
                            "masks:" +
                            describe_threads(block));
  }
}

}  // namespace

int block_barrier(Vote vote, int predicate, const char* name, Site site) {
  Fiber& self = *this_fiber;
  Block& block = *self.block;
  self.site = site;
  self.operation = name;
  if (block.at_barrier == 0) {
    block.barrier_vote = vote;
    block.barrier_site = site;
    block.barrier_votes = 0;
  } else {
    check_same_barrier(self, vote, site);
  }
  block.barrier_votes += predicate != 0 ? 1 : 0;
  char* tag = &block.barrier_tags[block.barriers_passed & 1];
  release(tag);
  stop_running(self, Waiting::kBlock);
  // Never complete when a thread has ended: what the hardware tolerates there is not relied on.
  if (++block.at_barrier == block.threads) complete_barrier(block, vote);
  run_next(self);
  acquire(tag);
  return block.barrier_result;
}

void warp_collective(CollectiveWork work, const char* name, uint32_t mask, void* operand, Site site,
                     bool orders_memory) {
  Fiber& self = *this_fiber;
  Block& block = *self.block;
  Warp& warp = block.warps[self.warp];
  const uint32_t own = 1u << self.lane;
  self.site = site;
  self.operation = name;
  if ((mask & own) == 0) {
    fail(std::string(name) + " at " + describe_site(site) +
         ": the mask does not name the calling lane");
  }
  if ((mask & ~warp.existing) != 0) {
    fail(std::string(name) + " at " + describe_site(site) +
         ": the mask names lanes that the block does not have");
  }
  warp.masks[self.lane] = mask;
  warp.works[self.lane] = work;
  warp.operands[self.lane] = operand;
  warp.waiting |= own;
  if (orders_memory) release(&self.arrived_tag);
  if ((warp.waiting & mask) != mask) {
    stop_running(self, Waiting::kWarp);
    run_next(self);
    if (orders_memory) acquire(&self.woken_tag);
    return;
  }

  check_same_collective(self, mask, work, site);
  const auto lane_fiber = [&](uint32_t lanes) -> Fiber& {
    return *block.fibers[self.warp * kWarpThreads +
                         static_cast<uint32_t>(std::countr_zero(lanes))];
  };
  if (kThreadSanitizer && orders_memory) {
    for (uint32_t left = mask; left != 0; left &= left - 1) acquire(&lane_fiber(left).arrived_tag);
  }
  block.unwatched = true;  // operands are on the stacks of the other lanes
  begin_unwatched();
  work(warp.operands.data(), mask);
  end_unwatched();
  block.unwatched = false;
  if (kThreadSanitizer && orders_memory) {
    for (uint32_t left = mask; left != 0; left &= left - 1) release(&lane_fiber(left).woken_tag);
  }
  ++block.progress;
  make_runnable(block, self.warp, mask);
  maybe_run_others(self);
}

}  // namespace emulation
