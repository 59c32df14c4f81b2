// Switching between stacks on one OS thread: 20 lines of assembler on x86-64 (some nanoseconds),
// ucontext elsewhere (some hundred).
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(FRSPEC_EMULATION_UCONTEXT)
#define FRSPEC_EMULATION_ASSEMBLER 1
#else
#include <ucontext.h>
#endif

namespace emulation {

#ifdef FRSPEC_EMULATION_ASSEMBLER
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void emulation_switch_stack(void** save, void* load);

inline void switch_context(Context& from, Context& to) {
  emulation_switch_stack(&from.stack_pointer, to.stack_pointer);
}
#else
struct Context {
  ucontext_t state{};
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#endif

// The first switch to `context` calls entry() on the given stack; entry must not return.
void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)());

}  // namespace emulation
