// Where threads meet: block barriers and warp collectives, and the checks that they meet in the
// same place.
#include <string>

#include "check.h"
#include "sanitizers.h"
#include "thread_block.h"

namespace emulation {
namespace {

using frspec::concat;

// Kept out of the functions that run all the time, which would need larger frames for them.
#define FRSPEC_EMULATION_COLD [[gnu::cold, gnu::noinline]]

FRSPEC_EMULATION_COLD void fail_meeting(Fiber& self, Waiting where, const char* what) {
  stop_running(self, where);
  abandon_block(self,
                concat(describe(*self.block, &self), what, ":", describe_threads(*self.block)));
}

FRSPEC_EMULATION_COLD void fail_mask(const char* name, const Site& site, const char* what) {
  fail(concat(name, " at ", describe_site(site), ": the mask ", what));
}

void complete_barrier(Block& block, Vote vote) {
  const int votes = block.barrier_votes;
  block.barrier_result = vote == Vote::kAny   ? (votes > 0 ? 1 : 0)
                         : vote == Vote::kAll ? (votes == static_cast<int>(block.threads) ? 1 : 0)
                                              : votes;
  block.at_barrier = 0;
  ++block.barriers_passed;
  for (uint32_t w = 0; w < block.warp_count; ++w) make_runnable(block, w, block.warps[w].existing);
}

// All lanes of the mask are in the same collective, for the same mask.
bool same_collective(const Block& block, const Warp& warp, const Fiber& self, uint32_t mask,
                     CollectiveWork work) {
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const auto lane = static_cast<uint32_t>(std::countr_zero(left));
    const Fiber& other = *block.fibers[self.warp * kWarpThreads + lane];
    if (warp.masks[lane] != mask || warp.works[lane] != work || !same_line(other.site, self.site)) {
      return false;
    }
  }
  return true;
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
  } else if (block.barrier_vote != vote || !same_line(block.barrier_site, site)) {
    fail_meeting(self, Waiting::kBlock, "threads of one block meet at different barriers");
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
  if ((mask & own) == 0) fail_mask(name, site, "does not name the calling lane");
  if ((mask & ~warp.existing) != 0) {
    fail_mask(name, site, "names lanes that the block does not have");
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

  if (!same_collective(block, warp, self, mask, work)) {
    fail_meeting(self, Waiting::kWarp,
                 "lanes of one warp meet at different collectives or with different masks");
  }
  const auto lane_fiber = [&](uint32_t lanes) -> Fiber& {
    return *block.fibers[self.warp * kWarpThreads + static_cast<uint32_t>(std::countr_zero(lanes))];
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
