// What happens at an access to unmapped memory.
//
// In a kernel, the handler lets the thread go on in a function that fails its launch, as if the
// access had been a call; so a test can look at the error and work on. Only an overflowing stack
// and host code end the process.
#include <signal.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>

#include "device_memory.h"
#include "sanitizers.h"
#include "thread_block.h"

#if defined(__x86_64__) || defined(__aarch64__)
#include <ucontext.h>
#endif

namespace emulation {
namespace {

struct sigaction previous_action;

// What the failing thread is told; set by the handler.
thread_local uintptr_t fault_address = 0;

void write_message(const std::string& text) {
  if (write(STDERR_FILENO, text.data(), text.size()) < 0) return;
}

[[noreturn]] void fail_access() {
  char address[32];
  std::snprintf(address, sizeof address, "%p", reinterpret_cast<void*>(fault_address));
  const bool on_device = in_device_range(reinterpret_cast<void*>(fault_address));
  fail(std::string("illegal access to ") + address +
       (on_device ? ", outside of every allocation of device memory" : ""));
}

// Continues the interrupted thread in fail_access().
bool redirect(ucontext_t& context, const Fiber& fiber) {
  constexpr uintptr_t kRedZone = 128;
  constexpr uintptr_t kNeeded = 8 << 10;
#if defined(__x86_64__)
  auto& stack_pointer = context.uc_mcontext.gregs[REG_RSP];
  auto& instruction = context.uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
  auto& stack_pointer = context.uc_mcontext.sp;
  auto& instruction = context.uc_mcontext.pc;
#else
  (void)context;
  (void)fiber;
  return false;
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  const auto top = static_cast<uintptr_t>(stack_pointer);
  const auto bottom = reinterpret_cast<uintptr_t>(fiber.stack);
  if (top < bottom + kNeeded || top > bottom + fiber.stack_bytes) return false;
  uintptr_t aligned = (top - kRedZone) & ~uintptr_t{15};
#if defined(__x86_64__)
  aligned -= sizeof(void*);  // as after a call
#endif
  stack_pointer = static_cast<std::remove_reference_t<decltype(stack_pointer)>>(aligned);
  instruction = static_cast<std::remove_reference_t<decltype(instruction)>>(
      reinterpret_cast<uintptr_t>(&fail_access));
  return true;
#endif
}

void on_fault(int, siginfo_t* info, void* context) {
  const Fiber* fiber = this_fiber;
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  if (fiber != nullptr && fiber->block != nullptr) {
    fault_address = address;
    if (redirect(*static_cast<ucontext_t*>(context), *fiber)) return;
    write_message(describe_current() + "the stack of a thread overflows (Config::stack_bytes)\n");
  } else if (in_device_range(info->si_addr)) {
    write_message("host code touches device memory, or memory that was freed\n");
  }
  sigaction(SIGSEGV, &previous_action, nullptr);  // the access is tried again, for the one before
}

// A handler needs a stack of its own when the thread's overflows.
void provide_signal_stack() {
  constexpr size_t kBytes = 64 << 10;
  static thread_local std::unique_ptr<char[]> memory;
  stack_t current{};
  if (sigaltstack(nullptr, &current) != 0 || (current.ss_flags & SS_DISABLE) == 0) return;
  memory = std::make_unique<char[]>(kBytes);
  stack_t stack{};
  stack.ss_sp = memory.get();
  stack.ss_size = kBytes;
  sigaltstack(&stack, nullptr);
}

}  // namespace

void install_fault_handler() {
  if (kAddressSanitizer || kThreadSanitizer) return;
  struct sigaction current {};
  sigaction(SIGSEGV, nullptr, &current);
  if ((current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == on_fault) return;
  previous_action = current;
  provide_signal_stack();
  struct sigaction action {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
}

}  // namespace emulation
