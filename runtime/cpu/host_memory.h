// Host memory: what may still be taken, and one resident block of it.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace frspec::cpu {

// Folders of the process's cgroup for a controller and of the cgroups around it, innermost first
// (cgroup v1 and v2). Here and below, `root` is where /proc and /sys are, "" but in tests.
std::vector<std::string> cgroup_folders(const std::string& controller, const std::string& root);

// Bytes that an allocation may still take: the system's available memory, and the room in the
// memory limits of the cgroups.
size_t available_memory(const std::string& root = "");

// Zero-filled memory, aligned to huge pages and backed by them where the system grants them.
class HostMemory {
 public:
  HostMemory() = default;
  explicit HostMemory(size_t bytes);  // MemoryPlanError when it cannot be had
  HostMemory(HostMemory&& other) noexcept;
  HostMemory& operator=(HostMemory&& other) noexcept;
  ~HostMemory();

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace frspec::cpu
