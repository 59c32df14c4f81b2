// How blocks and threads are named in messages.
#include <cstdio>
#include <map>
#include <string>

#include "check.h"
#include "thread_block.h"

namespace emulation {
namespace {

using frspec::concat;

std::string triple(const uint3& v) { return concat("(", v.x, ",", v.y, ",", v.z, ")"); }

std::string lane_of(const Fiber& fiber) {
  return concat(triple(fiber.thread), " (warp ", fiber.warp, " lane ", fiber.lane, ")");
}

std::string activity(const Block& block, const Fiber& fiber) {
  const Warp& warp = block.warps[fiber.warp];
  if ((warp.runnable >> fiber.lane & 1) != 0) return "run or poll";
  switch (fiber.waiting) {
    case Waiting::kEnded:
      return "exited the kernel";
    case Waiting::kDependency:
      return "wait in dependency_wait()";
    default:
      break;
  }
  char mask[32] = "";
  if (fiber.waiting == Waiting::kWarp) {
    std::snprintf(mask, sizeof mask, " with mask 0x%08x", warp.masks[fiber.lane]);
  }
  return concat("wait at ", fiber.operation, mask, " at ", describe_site(fiber.site));
}

}  // namespace

std::string describe_site(const Site& site) {
  const std::string file = site.file_name();
  return concat(file.substr(file.rfind('/') + 1), ":", site.line());
}

std::string describe(const Block& block, const Fiber* fiber) {
  const std::string thread = fiber == nullptr ? "" : concat(", thread ", lane_of(*fiber));
  return concat("kernel ", block.call->name, ", block ", triple(block.index), thread, ": ");
}

std::string describe_current() {
  if (this_fiber == nullptr || this_fiber->block == nullptr) return "host code: ";
  return describe(*this_fiber->block, this_fiber);
}

std::string describe_threads(const Block& block) {
  struct Group {
    int count;
    const Fiber* first;
  };
  std::map<std::string, Group> groups;
  for (uint32_t i = 0; i < block.threads; ++i) {
    const Fiber& fiber = *block.fibers[i];
    groups.try_emplace(activity(block, fiber), Group{0, &fiber}).first->second.count++;
  }
  std::string text;
  for (const auto& [what, group] : groups) {
    text += concat("\n    ", group.count, " thread(s), first ", lane_of(*group.first), ": ", what);
  }
  return text;
}

}  // namespace emulation
