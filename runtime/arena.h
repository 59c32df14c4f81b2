// The memory plan and the arena that serves it (contract 3: memory is planned, then taken once).
//
// The code that lays out buffers runs twice. First over a planning arena, which has no memory and
// only records names and bytes: that is the plan, and it can be printed without loading anything.
// Then over the real memory, which the backend allocated in one piece: exactly the planned size,
// less what plan_beside() notes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "tensor.h"

namespace frspec {

struct MemoryItem {
  std::string name;  // what the memory is for, e.g. "target weights"
  size_t bytes;      // alignment padding included
};

struct MemoryPlan {
  std::vector<MemoryItem> items;  // in order of first use; equal names are added up
  size_t total_bytes() const {
    size_t sum = 0;
    for (const MemoryItem& item : items) sum += item.bytes;
    return sum;
  }
};

class Arena {
 public:
  // More than cache lines, vector loads and bulk copies ask for: what cuBLAS asks of its workspace.
  static constexpr size_t kAlignment = 256;
  static constexpr size_t kMostBytes = SIZE_MAX / 2;

  Arena() = default;  // planning: every take() returns null
  Arena(void* base, size_t capacity) : base_(static_cast<char*>(base)), capacity_(capacity) {}

  bool planning() const { return base_ == nullptr; }

  void* take(const char* name, size_t bytes) {
    const size_t padded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    FRSPEC_CHECK(padded >= bytes && padded <= kMostBytes - used_, MemoryPlanError, "memory plan: '",
                 name, "' brings it beyond the ", kMostBytes,
                 " bytes that can be addressed; a shorter context needs less");
    FRSPEC_CHECK(planning() || used_ + padded <= capacity_, MemoryPlanError,
                 "memory plan exceeded by '", name, "': planned ", capacity_, " bytes, needed ",
                 used_ + padded);
    void* memory = planning() ? nullptr : base_ + used_;
    used_ += padded;
    record(name, padded);
    return memory;
  }

  template <typename T>
  T* take_array(const char* name, size_t count) {
    return static_cast<T*>(take(name, count * sizeof(T)));
  }

  Tensor take_tensor(const char* name, DType dtype, int64_t rows, int64_t cols) {
    return {take(name, static_cast<size_t>(rows * cols) * dtype_size(dtype)), dtype, rows, cols,
            cols};
  }

  // Puts into the plan what others will take of the same memory, not out of this arena.
  void plan_beside(const char* name, size_t bytes) { record(name, bytes); }

  size_t used_bytes() const { return used_; }
  const MemoryPlan& plan() const { return plan_; }

 private:
  void record(const char* name, size_t bytes) {
    for (MemoryItem& item : plan_.items) {
      if (item.name == name) {
        item.bytes += bytes;
        return;
      }
    }
    plan_.items.push_back({name, bytes});
  }

  char* base_ = nullptr;
  size_t capacity_ = 0;
  size_t used_ = 0;
  MemoryPlan plan_;
};

}  // namespace frspec
