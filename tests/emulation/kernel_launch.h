// What a kernel launch is made of, and how it gets into a stream.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

namespace emulation {

struct KernelCall {
  std::string_view name;
  const void* function;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  std::shared_ptr<const void> arguments;
  // One thread's work.
  void (*invoke)(const void* arguments);
  // Error when a pointer among the arguments is not one that the device can use.
  void (*check_arguments)(std::string_view name, const void* arguments);
};

// The kernel's name with its template arguments, out of the compiler's name of this function.
template <auto Kernel>
constexpr std::string_view kernel_name() {
  std::string_view text = __PRETTY_FUNCTION__;
  constexpr std::string_view kStart = "Kernel = ";
  const size_t start = text.find(kStart);
  if (start != text.npos) text.remove_prefix(start + kStart.size());
  const size_t end = text.find("; std::string_view");
  return text.substr(0, end == text.npos ? text.size() - 1 : end);
}

// Error when `p` is neither in device memory nor in pinned host memory.
void check_pointer(std::string_view kernel, int argument, const void* p);

template <typename T>
void check_argument(std::string_view kernel, int argument, const T& value) {
  if constexpr (std::is_pointer_v<T>) {
    if (value != nullptr) check_pointer(kernel, argument, reinterpret_cast<const void*>(value));
  }
}

template <typename Function>
struct KernelTraits;

template <typename... Parameters>
struct KernelTraits<void (*)(Parameters...)> {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...),
                "kernel parameters are copied bytewise");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "kernel parameters exceed 4 KiB");
  using Arguments = std::tuple<Parameters...>;

  template <auto Kernel>
  static KernelCall make(dim3 grid, dim3 block, size_t shared_bytes, Parameters... arguments) {
    return {kernel_name<Kernel>(),
            reinterpret_cast<const void*>(Kernel),
            grid,
            block,
            shared_bytes,
            std::make_shared<const Arguments>(arguments...),
            [](const void* p) { std::apply(Kernel, *static_cast<const Arguments*>(p)); },
            [](std::string_view name, const void* p) {
              std::apply(
                  [&](const Parameters&... values) {
                    [[maybe_unused]] int index = 0;
                    (check_argument(name, index++, values), ...);
                  },
                  *static_cast<const Arguments*>(p));
            }};
  }
};

template <auto Kernel, typename... Args>
KernelCall make_launch(dim3 grid, dim3 block, size_t shared_bytes, Args&&... args) {
  return KernelTraits<decltype(Kernel)>::template make<Kernel>(grid, block, shared_bytes,
                                                               std::forward<Args>(args)...);
}

// cudaLaunchKernelEx: checks the configuration and queues or captures the call.
cudaError_t enqueue_kernel(KernelCall call, cudaStream_t stream);

}  // namespace emulation
