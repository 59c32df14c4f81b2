// Device memory and pinned host memory. Internal to the emulation.
//
// Device memory comes from one range of addresses. Allocations are NaN at first, end right before
// an unmapped page, and are protected from host code unless a DeviceScope is open.
#pragma once

#include <cstddef>
#include <string_view>

namespace emulation {

// Null beyond Config::device_bytes.
void* allocate_device(size_t bytes);
// False when nothing was allocated there.
bool free_device(void* p);
// What Config::device_bytes leaves.
size_t free_device_bytes();
// Whether the address belongs to the device, allocated or not.
bool in_device_range(const void* p);
// Error when something was written next to an allocation.
void check_device_margins(std::string_view kernel);

void* allocate_pinned(size_t bytes);
bool free_pinned(void* p);
bool in_pinned(const void* p, size_t bytes);

size_t live_allocations();
void free_all_memory();
// For tests of what happens then.
void use_up_device_addresses();

// While one is open, device memory can be accessed.
class DeviceScope {
 public:
  DeviceScope();
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
};

// ---- fault_handler.cpp

// Turns a device thread's access to unmapped memory into an Error of its launch, and says what the
// host did wrong before it dies. In builds with sanitizers they report it. Kept in force by being
// called again: others install handlers too.
void install_fault_handler();

}  // namespace emulation
