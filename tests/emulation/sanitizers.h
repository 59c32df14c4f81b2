// What AddressSanitizer and ThreadSanitizer have to be told: which bytes nobody may touch, that the
// stack changes, and which steps of the emulation order the memory accesses of CUDA threads. All of
// it is empty in other builds.
//
// With ThreadSanitizer every CUDA thread is a thread of its own, whose accesses are ordered by
// barriers only. The emulation's own files are built without it (FRSPEC_EMULATION_TSAN is set
// instead), since its scheduler would look like one big race.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define FRSPEC_EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FRSPEC_EMULATION_ASAN 1
#endif
#endif

#ifdef FRSPEC_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FRSPEC_EMULATION_NO_ASAN __attribute__((no_sanitize("address")))
#else
#define FRSPEC_EMULATION_NO_ASAN
#endif

#ifdef FRSPEC_EMULATION_TSAN
extern "C" {
void __tsan_acquire(void* tag);
void __tsan_release(void* tag);
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulation {

#ifdef FRSPEC_EMULATION_ASAN
inline constexpr bool kAddressSanitizer = true;
inline void forbid_access(const void* p, size_t bytes) { ASAN_POISON_MEMORY_REGION(p, bytes); }
inline void allow_access(const void* p, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(p, bytes); }
inline void before_switch(void** fake_stack, const char* to_stack, size_t to_bytes) {
  __sanitizer_start_switch_fiber(fake_stack, to_stack, to_bytes);
}
inline void after_switch(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
#else
inline constexpr bool kAddressSanitizer = false;
inline void forbid_access(const void*, size_t) {}
inline void allow_access(const void*, size_t) {}
inline void before_switch(void**, const char*, size_t) {}
inline void after_switch(void*) {}
#endif

#ifdef FRSPEC_EMULATION_TSAN
inline constexpr bool kThreadSanitizer = true;
// What one thread did before release(tag) happens before what another does after acquire(tag).
inline void release(void* tag) { __tsan_release(tag); }
inline void acquire(void* tag) { __tsan_acquire(tag); }
inline void* this_race_thread() { return __tsan_get_current_fiber(); }
inline void* make_race_thread() { return __tsan_create_fiber(0); }
inline void end_race_thread(void* thread) { __tsan_destroy_fiber(thread); }
inline void switch_race_thread(void* thread) {
  constexpr unsigned kNoSynchronisation = 1;
  __tsan_switch_to_fiber(thread, kNoSynchronisation);
}
// The emulation touches memory on behalf of several CUDA threads.
inline void begin_unwatched() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
inline void end_unwatched() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#else
inline constexpr bool kThreadSanitizer = false;
inline void release(void*) {}
inline void acquire(void*) {}
inline void* this_race_thread() { return nullptr; }
inline void* make_race_thread() { return nullptr; }
inline void end_race_thread(void*) {}
inline void switch_race_thread(void*) {}
inline void begin_unwatched() {}
inline void end_unwatched() {}
#endif

}  // namespace emulation
