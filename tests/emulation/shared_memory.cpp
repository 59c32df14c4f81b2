// Shared memory of a block, in pieces with gaps between them, and asynchronous copies into it.
//
// Pieces are NaN at first (0xff in every byte). Nobody may touch the gaps: AddressSanitizer notices
// it at once, and what was written there is noticed when the block ends.
#include <algorithm>
#include <cstring>
#include <string>

#include "sanitizers.h"
#include "thread_block.h"

namespace emulation {
namespace {

constexpr size_t kGapBytes = 64;
constexpr size_t kAlignment = 1024;
constexpr size_t kCarvedAlignment = 128;
constexpr unsigned char kNaN = 0xff;

// Room for the gaps and alignment of all pieces.
size_t slack_bytes() { return 2 * SharedPieces::kCapacity * (kGapBytes + kAlignment); }

void fill(void* p, size_t bytes) {
  begin_unwatched();
  std::memset(p, kNaN, bytes);
  end_unwatched();
}

// At `beyond` bytes behind a multiple of `align`; beyond < align.
SharedPiece& add_piece(Block& block, SharedPieces& pieces, const void* key, size_t bytes,
                       size_t align, size_t beyond, const char* name) {
  const size_t least = block.shared_used + kGapBytes;
  const size_t begin = (least + align - 1 - beyond) / align * align + beyond;
  if (pieces.count == SharedPieces::kCapacity ||
      begin + bytes + kGapBytes > block.shared_capacity) {
    fail("the emulation has no room for this many pieces of shared memory");
  }
  unsigned char* data = block.shared + begin;
  allow_access(data, bytes);
  if (kAddressSanitizer) {
    fill(data, bytes);
  } else {  // with the gap behind it; the one before it may already have been written to
    const size_t filled = block.shared_used == 0 ? 0 : block.shared_used + kGapBytes;
    fill(block.shared + filled, begin + bytes + kGapBytes - filled);
  }
  block.shared_used = begin + bytes;
  return pieces.items[pieces.count++] = {key, data, bytes, name};
}

bool untouched_gap(const unsigned char* gap) {
  static const auto expected = [] {
    std::array<unsigned char, kGapBytes> bytes;
    bytes.fill(kNaN);
    return bytes;
  }();
  return std::memcmp(gap, expected.data(), kGapBytes) == 0;
}

// Through functions that ThreadSanitizer watches, since these are accesses of the thread.
void copy_now(const AsyncCopy& copy) {
  const void* source = copy.taken ? copy.held.data() : copy.source;
  if (!kThreadSanitizer && copy.source_bytes == 16 && copy.bytes == 16) {
    std::memcpy(copy.destination, source, 16);
    return;
  }
  std::memcpy(copy.destination, source, copy.source_bytes);
  std::memset(static_cast<char*>(copy.destination) + copy.source_bytes, 0,
              copy.bytes - copy.source_bytes);
}

}  // namespace

void start_shared_memory(Block& block) {
  const size_t capacity = config().shared_bytes_per_block + slack_bytes();
  if (block.shared_storage.size() < capacity + kAlignment) {
    block.shared_storage.resize(capacity + kAlignment);
  }
  const auto storage = reinterpret_cast<uintptr_t>(block.shared_storage.data());
  block.shared =
      reinterpret_cast<unsigned char*>((storage + kAlignment - 1) / kAlignment * kAlignment);
  block.shared_capacity = capacity;
  block.shared_used = 0;
  block.static_bytes = 0;
  block.dynamic_bytes = 0;
  block.statics.count = 0;
  block.carved.count = 0;
  forbid_access(block.shared, capacity);
}

void finish_shared_memory(Block& block) {
  allow_access(block.shared, block.shared_capacity);
  if (kAddressSanitizer) return;
  const auto check_gap = [&](const SharedPiece& piece) {
    const bool clean =
        untouched_gap(piece.data - kGapBytes) && untouched_gap(piece.data + piece.bytes);
    if (!clean && block.error.empty()) {
      block.error = describe(block, nullptr) + "writes next to the " + std::to_string(piece.bytes) +
                    " bytes of shared memory of " + piece.name;
    }
  };
  for (size_t i = 0; i < block.statics.count; ++i) check_gap(block.statics.items[i]);
  for (size_t i = 0; i < block.carved.count; ++i) check_gap(block.carved.items[i]);
}

void* shared_static(const void* key, size_t bytes, size_t align, const char* name) {
  Block& block = *this_fiber->block;
  for (size_t i = 0; i < block.statics.count; ++i) {
    if (block.statics.items[i].key == key) return block.statics.items[i].data;
  }
  block.static_bytes += bytes;
  if (block.static_bytes > kDefaultSharedBytes ||
      block.static_bytes + block.call->shared_bytes > config().shared_bytes_per_block) {
    fail(std::string("shared memory exceeds what a block may have, at ") + name);
  }
  return add_piece(block, block.statics, key, bytes, std::max<size_t>(align, 16), 0, name).data;
}

void restart_carving() { this_fiber->carved = 0; }

void* carve_dynamic(size_t bytes) {
  Fiber& self = *this_fiber;
  Block& block = *self.block;
  const uint32_t index = self.carved++;
  if (index < block.carved.count) {
    const SharedPiece& piece = block.carved.items[index];
    if (piece.bytes != bytes) fail("threads carve the dynamic shared memory differently");
    return piece.data;
  }
  // Where the device has it, as far as swizzles can tell.
  const size_t beyond = block.dynamic_bytes % kAlignment;
  block.dynamic_bytes += (bytes + kCarvedAlignment - 1) / kCarvedAlignment * kCarvedAlignment;
  if (block.dynamic_bytes > block.call->shared_bytes) {
    fail("dynamic shared memory: " + std::to_string(block.dynamic_bytes) + " bytes carved, " +
         std::to_string(block.call->shared_bytes) + " bytes launched");
  }
  return add_piece(block, block.carved, nullptr, bytes, kAlignment, beyond, "SmemCarver").data;
}

bool in_shared(const void* p, size_t bytes) {
  if (this_fiber == nullptr) return false;
  const Block& block = *this_fiber->block;
  const auto* begin = static_cast<const unsigned char*>(p);
  return begin >= block.shared && begin + bytes <= block.shared + block.shared_used;
}

void copy_async(void* shared, const void* global, uint32_t source_bytes, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0 || !in_shared(shared, bytes)) {
    fail("asynchronous copy: the destination is not aligned shared memory of this block");
  }
  if (source_bytes > bytes) fail("asynchronous copy: more source bytes than there is room for");
  if (source_bytes > 0 &&
      (reinterpret_cast<uintptr_t>(global) % bytes != 0 || !in_device(global, source_bytes))) {
    fail("asynchronous copy: the source is not aligned device memory");
  }
  AsyncCopy copy{shared, global, source_bytes, bytes, false, {}};
  switch (config().copies) {
    case Copies::kEager:
      copy_now(copy);
      return;
    case Copies::kPoison:
      std::memset(shared, kNaN, bytes);
      break;
    case Copies::kDefer:
      break;
  }
  // The kernel in front has not run yet, and the hardware may read the source at once.
  if (this_fiber->block->early && bytes <= copy.held.size()) {
    std::memcpy(copy.held.data(), global, source_bytes);
    copy.taken = true;
  }
  this_fiber->copies.push_back(copy);
}

void commit_copies() {
  Fiber& self = *this_fiber;
  self.copy_groups.push_back(static_cast<uint32_t>(self.copies.size()));
}

void wait_for_copies(uint32_t pending_groups) {
  Fiber& self = *this_fiber;
  if (self.copy_groups.size() <= pending_groups) return;
  const size_t groups = self.copy_groups.size() - pending_groups;
  const uint32_t end = self.copy_groups[groups - 1];
  for (uint32_t i = 0; i < end; ++i) copy_now(self.copies[i]);
  self.copies.erase(self.copies.begin(), self.copies.begin() + end);
  self.copy_groups.erase(self.copy_groups.begin(),
                         self.copy_groups.begin() + static_cast<ptrdiff_t>(groups));
  for (uint32_t& group : self.copy_groups) group -= end;
}

}  // namespace emulation
