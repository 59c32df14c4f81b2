// The switch itself, and the first frame of a stack.
#include "context_switch.h"

#include <cstdint>
#include <cstdlib>

#ifdef FRSPEC_EMULATION_ASSEMBLER

// Saves the registers that a callee must keep on the old stack and takes them from the new one. The
// floating-point control words are the same for all.
asm(R"(
.text
.globl emulation_switch_stack
.type emulation_switch_stack,@function
emulation_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch_stack,.-emulation_switch_stack
)");

namespace emulation {

void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{63};
  auto** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // where entry would return to: unused, but keeps the stack's alignment
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--slot = nullptr;
  context.stack_pointer = slot;
}

}  // namespace emulation

#else

namespace emulation {

void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  if (getcontext(&context.state) != 0) std::abort();
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

}  // namespace emulation

#endif
