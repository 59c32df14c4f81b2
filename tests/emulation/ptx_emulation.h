// Twins of the inline PTX in cuda/ptx.cuh, which includes this: the same names, checked use.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda_emulation.h"

namespace emulation {

// What a lane brings to, and gets from, mma.m16n8k16: its fragments.
struct MmaOperand {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};
// Products are exact, sums are in double and rounded once; the hardware differs in the last bits.
void run_mma_bf16(void* const* operands, uint32_t mask);
void run_mma_fp16(void* const* operands, uint32_t mask);

struct LdmatrixOperand {
  uint32_t* registers;
  const void* row;
};
void run_ldmatrix_x4(void* const* operands, uint32_t mask);
void run_ldmatrix_x2(void* const* operands, uint32_t mask);
void run_ldmatrix_x4_transposed(void* const* operands, uint32_t mask);

inline constexpr uint32_t kFullWarp = 0xffffffffu;

// The lane reads its row itself where ThreadSanitizer is to see who reads.
inline void touch_row([[maybe_unused]] const void* row) {
#ifdef FRSPEC_EMULATION_TSAN
  const auto* words = static_cast<const volatile uint64_t*>(row);
  (void)words[0];
  (void)words[1];
#endif
}

}  // namespace emulation

namespace frspec::cuda {

template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 emulation::Site site = emulation::Site::current()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  constexpr auto kRun =
      std::is_same_v<T, __nv_bfloat16> ? emulation::run_mma_bf16 : emulation::run_mma_fp16;
  emulation::MmaOperand operand{d, a, b};
  emulation::warp_collective(kRun, "mma_16x8x16", emulation::kFullWarp, &operand, site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row,
                        emulation::Site site = emulation::Site::current()) {
  emulation::touch_row(row);
  emulation::LdmatrixOperand operand{r, row};
  emulation::warp_collective(emulation::run_ldmatrix_x4, "ldmatrix_x4", emulation::kFullWarp,
                             &operand, site);
}
// The addresses of lanes 16 ... 31 are not used.
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row,
                        emulation::Site site = emulation::Site::current()) {
  if (emulation::current_lane() < 16) emulation::touch_row(row);
  emulation::LdmatrixOperand operand{r, row};
  emulation::warp_collective(emulation::run_ldmatrix_x2, "ldmatrix_x2", emulation::kFullWarp,
                             &operand, site);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row,
                                   emulation::Site site = emulation::Site::current()) {
  emulation::touch_row(row);
  emulation::LdmatrixOperand operand{r, row};
  emulation::warp_collective(emulation::run_ldmatrix_x4_transposed, "ldmatrix_x4_transposed",
                             emulation::kFullWarp, &operand, site);
}

inline void copy_async_16(void* shared, const void* global, int source_bytes = 16) {
  emulation::copy_async(shared, global, static_cast<uint32_t>(source_bytes), 16);
}
inline void copy_async_commit() { emulation::commit_copies(); }
template <int kPending>
void copy_async_wait() {
  emulation::wait_for_copies(kPending);
}

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline void dependency_launch() { emulation::launch_dependents(); }
inline void dependency_wait() { emulation::wait_for_dependency(); }

}  // namespace frspec::cuda
