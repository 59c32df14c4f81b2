#include "cpu/host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <sstream>
#include <utility>

#include "check.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace frspec::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kUnlimited = SIZE_MAX;

// The number in a file; kUnlimited when the file is absent or says "max".
size_t read_limit(const std::string& path) {
  std::ifstream file(path);
  size_t value = 0;
  return file >> value ? value : kUnlimited;
}

size_t system_available(const std::string& root) {
  std::ifstream file(root + "/proc/meminfo");
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream fields(line);
    std::string name;
    size_t kibibytes = 0;
    if (fields >> name >> kibibytes && name == "MemAvailable:") return kibibytes * 1024;
  }
  return kUnlimited;
}

// Page cache counts as used by a cgroup, and gives way.
size_t reclaimable_bytes(const std::string& folder) {
  std::ifstream file(folder + "/memory.stat");
  std::string name;
  size_t value = 0;
  size_t reclaimable = 0;
  bool hierarchical = false;
  while (file >> name >> value) {
    if (name == "total_inactive_file") hierarchical = true;
    if (name == "total_inactive_file" || (name == "inactive_file" && !hierarchical)) {
      reclaimable = value;
    }
  }
  return reclaimable;
}

}  // namespace

std::vector<std::string> cgroup_folders(const std::string& controller, const std::string& root) {
  std::vector<std::string> folders;
  std::ifstream file(root + "/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers(1, ',');
    controllers.append(line, first + 1, second - first - 1).push_back(',');
    std::string path = line.substr(second + 1);
    std::string mount = root + "/sys/fs/cgroup";
    if (controllers != ",,") {  // v1
      if (controllers.find(concat(",", controller, ",")) == std::string::npos) continue;
      mount += "/" + controller;
    }
    // Inside a container the path may not exist; then the root of the mount is the own cgroup.
    while (!path.empty() && path != "/") {
      folders.push_back(mount + path);
      path.resize(path.find_last_of('/'));
    }
    folders.push_back(mount);
  }
  return folders;
}

size_t available_memory(const std::string& root) {
  size_t available = system_available(root);
  for (const std::string& folder : cgroup_folders("memory", root)) {
    size_t limit = read_limit(folder + "/memory.max");
    size_t used = read_limit(folder + "/memory.current");
    if (limit == kUnlimited) {
      limit = read_limit(folder + "/memory.limit_in_bytes");
      used = read_limit(folder + "/memory.usage_in_bytes");
    }
    if (limit == kUnlimited || used == kUnlimited) continue;
    used -= std::min(used, reclaimable_bytes(folder));
    available = std::min(available, limit > used ? limit - used : 0);
  }
  return available;
}

HostMemory::HostMemory(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  const size_t available = available_memory();
  FRSPEC_CHECK(bytes <= available, MemoryPlanError, "not enough memory: the plan needs ", bytes,
               " bytes, ", available, " are available");
  mapping_bytes_ = (bytes + kHugePage - 1) / kHugePage * kHugePage + kHugePage;
  mapping_ =
      mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw MemoryPlanError(
        concat("the system refused ", bytes, " bytes of memory: ", std::strerror(errno)));
  }
  const uintptr_t start =
      (reinterpret_cast<uintptr_t>(mapping_) + kHugePage - 1) / kHugePage * kHugePage;
  data_ = reinterpret_cast<void*>(start);
  madvise(data_, mapping_bytes_ - kHugePage, MADV_HUGEPAGE);  // a wish: small pages work too
  if (madvise(data_, bytes, MADV_POPULATE_WRITE) != 0) {
    if (errno == ENOMEM || errno == EFAULT || errno == EHWPOISON) {
      const int reason = errno;
      munmap(mapping_, mapping_bytes_);
      mapping_ = nullptr;
      throw MemoryPlanError(concat("the system could not back ", bytes,
                                   " bytes with memory: ", std::strerror(reason)));
    }
    volatile char* page = static_cast<char*>(data_);
    for (size_t at = 0; at < bytes; at += 4096) page[at] = 0;
  }
}

HostMemory::HostMemory(HostMemory&& other) noexcept { *this = std::move(other); }

HostMemory& HostMemory::operator=(HostMemory&& other) noexcept {
  std::swap(mapping_, other.mapping_);
  std::swap(mapping_bytes_, other.mapping_bytes_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

HostMemory::~HostMemory() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
}

}  // namespace frspec::cpu
