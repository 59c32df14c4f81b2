// Device memory and pinned host memory.
#include "device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "device_thread.h"
#include "emulation_config.h"
#include "kernel_launch.h"
#include "sanitizers.h"

namespace emulation {
namespace {

constexpr size_t kPage = 4096;
// What is at least as large gets pages of this size: protecting small ones one by one would take
// longer than many a kernel.
constexpr size_t kHugePage = 2 << 20;
constexpr size_t kAlignment = 256;  // cudaMalloc promises it
constexpr size_t kRangeBytes = size_t{64} << 30;
constexpr unsigned char kNaN = 0xff;

size_t round_up(size_t bytes, size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

struct Allocation {
  size_t bytes;
  char* pages;
  size_t mapped_bytes;
};

struct Memory {
  char* range = nullptr;
  size_t next = 0;  // offset at which the search for free pages begins
  size_t used_bytes = 0;
  std::map<char*, Allocation> allocations;
  std::map<char*, size_t> pinned;
  int scopes = 0;
  bool accessible = true;
};

// Never destroyed: static objects of the program may free memory after it would have been.
Memory& memory() {
  static Memory* const instance = new Memory;
  return *instance;
}

void reserve_range() {
  Memory& m = memory();
  if (m.range != nullptr) return;
  void* range = mmap(nullptr, kRangeBytes + kHugePage, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) throw Error("cannot reserve addresses for device memory");
  m.range =
      reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(range), size_t{kHugePage}));
  m.accessible = m.scopes > 0 || !config().protect_memory;
}

void set_accessible(bool accessible) {
  Memory& m = memory();
  if (m.accessible == accessible) return;
  for (const auto& [begin, a] : m.allocations) {
    mprotect(a.pages, a.mapped_bytes, accessible ? PROT_READ | PROT_WRITE : PROT_NONE);
  }
  m.accessible = accessible;
}

// Addresses of what was freed are used again only when the range is used up, so that late accesses
// meet nothing. Null: no gap is large enough.
char* find_pages(size_t bytes, size_t page) {
  Memory& m = memory();
  for (const bool from_start : {false, true}) {
    size_t begin = from_start ? 0 : m.next;
    for (auto next = m.allocations.lower_bound(m.range + begin);; ++next) {
      // An unmapped page on both sides.
      begin = round_up(begin + kPage, page);
      const size_t end = next == m.allocations.end()
                             ? kRangeBytes
                             : static_cast<size_t>(next->second.pages - m.range);
      if (begin + bytes + kPage <= end) return m.range + begin;
      if (next == m.allocations.end()) break;
      begin = static_cast<size_t>(next->second.pages - m.range) + next->second.mapped_bytes;
    }
  }
  return nullptr;
}

bool is_untouched(const char* p, size_t bytes) {
  static const auto expected = [] {
    std::array<unsigned char, kAlignment> values;
    values.fill(kNaN);
    return values;
  }();
  return std::memcmp(p, expected.data(), bytes) == 0;
}

std::map<char*, Allocation>::const_iterator find_allocation(const void* p, size_t bytes) {
  const auto& allocations = memory().allocations;
  auto* begin = static_cast<char*>(const_cast<void*>(p));
  auto at = allocations.upper_bound(begin);
  if (at == allocations.begin()) return allocations.end();
  --at;
  const size_t offset = static_cast<size_t>(begin - at->first);
  const bool inside = offset <= at->second.bytes && bytes <= at->second.bytes - offset;
  return inside ? at : allocations.end();
}

}  // namespace

void* allocate_device(size_t bytes) {
  reserve_range();
  install_fault_handler();
  Memory& m = memory();
  const size_t rounded = round_up(std::max<size_t>(bytes, 1), kAlignment);
  const size_t page = rounded < kHugePage ? kPage : kHugePage;
  const size_t mapped = round_up(rounded, page);
  if (bytes > kRangeBytes || rounded > free_device_bytes()) return nullptr;
  char* pages = find_pages(mapped, page);
  if (pages == nullptr || mprotect(pages, mapped, PROT_READ | PROT_WRITE) != 0) return nullptr;
  if (page == kHugePage) madvise(pages, mapped, MADV_HUGEPAGE);
  m.next = static_cast<size_t>(pages - m.range) + mapped;
  char* begin = pages + mapped - rounded;
  allow_access(pages, mapped);
  std::memset(pages, kNaN, mapped);
  forbid_access(pages, mapped);
  allow_access(begin, bytes);
  m.allocations[begin] = {bytes, pages, mapped};
  m.used_bytes += rounded;
  if (!m.accessible) mprotect(pages, mapped, PROT_NONE);
  return begin;
}

bool free_device(void* p) {
  Memory& m = memory();
  const auto at = m.allocations.find(static_cast<char*>(p));
  if (at == m.allocations.end()) return false;
  const Allocation& a = at->second;
  m.used_bytes -= round_up(std::max<size_t>(a.bytes, 1), kAlignment);
  forbid_access(a.pages, a.mapped_bytes);
  mprotect(a.pages, a.mapped_bytes, PROT_NONE);
  madvise(a.pages, a.mapped_bytes, MADV_DONTNEED);
  m.allocations.erase(at);
  return true;
}

size_t free_device_bytes() {
  const size_t total = config().device_bytes;
  return total - std::min(total, memory().used_bytes);
}

bool in_device_range(const void* p) {
  const Memory& m = memory();
  const auto* address = static_cast<const char*>(p);
  return m.range != nullptr && address >= m.range && address < m.range + kRangeBytes;
}

bool in_device(const void* p, size_t bytes) {
  return find_allocation(p, bytes) != memory().allocations.end();
}

void check_device_margins(std::string_view kernel) {
  if (kAddressSanitizer) return;  // it knows the margins itself
  for (const auto& [begin, a] : memory().allocations) {
    const size_t before = std::min<size_t>(static_cast<size_t>(begin - a.pages), kAlignment);
    const size_t behind = static_cast<size_t>(a.pages + a.mapped_bytes - begin) - a.bytes;
    if (is_untouched(begin - before, before) && is_untouched(begin + a.bytes, behind)) continue;
    // Once is enough: later kernels are not to be blamed.
    std::memset(begin - before, kNaN, before);
    std::memset(begin + a.bytes, kNaN, behind);
    throw Error("kernel " + std::string(kernel) + ": writes next to an allocation of " +
                std::to_string(a.bytes) + " bytes of device memory");
  }
}

void* allocate_pinned(size_t bytes) {
  const size_t rounded = round_up(std::max<size_t>(bytes, 1), kPage);
  void* p = std::aligned_alloc(kPage, rounded);
  if (p == nullptr) return nullptr;
  std::memset(p, kNaN, rounded);
  forbid_access(static_cast<char*>(p) + bytes, rounded - bytes);
  memory().pinned[static_cast<char*>(p)] = bytes;
  return p;
}

bool free_pinned(void* p) {
  auto& pinned = memory().pinned;
  const auto at = pinned.find(static_cast<char*>(p));
  if (at == pinned.end()) return false;
  allow_access(p, round_up(std::max<size_t>(at->second, 1), kPage));
  pinned.erase(at);
  std::free(p);
  return true;
}

bool in_pinned(const void* p, size_t bytes) {
  const auto& pinned = memory().pinned;
  auto* begin = static_cast<char*>(const_cast<void*>(p));
  auto at = pinned.upper_bound(begin);
  if (at == pinned.begin()) return false;
  --at;
  const auto offset = static_cast<size_t>(begin - at->first);
  return offset <= at->second && bytes <= at->second - offset;
}

size_t live_allocations() { return memory().allocations.size() + memory().pinned.size(); }

void use_up_device_addresses() { memory().next = kRangeBytes; }

void free_all_memory() {
  Memory& m = memory();
  while (!m.allocations.empty()) free_device(m.allocations.begin()->first);
  while (!m.pinned.empty()) free_pinned(m.pinned.begin()->first);
}

void check_pointer(std::string_view kernel, int argument, const void* p) {
  if (in_device(p, 0) || in_pinned(p, 0)) return;
  throw Error("launch of " + std::string(kernel) + ": argument " + std::to_string(argument) +
              " is no device pointer");
}

DeviceScope::DeviceScope() {
  if (memory().scopes++ > 0) return;
  set_accessible(true);
  install_fault_handler();
}

DeviceScope::~DeviceScope() {
  if (--memory().scopes == 0 && config().protect_memory) set_accessible(false);
}

}  // namespace emulation
