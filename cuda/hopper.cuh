// What compute capability 9.0 alone has: boxes of a matrix that the hardware copies by itself
// (TMA), barriers that count their bytes, and products of warpgroups (wgmma). Inline PTX, as in
// ptx.cuh; the emulated twin is tests/emulation/hopper_emulation.h.
//
// Only where a build says 90a (FRSPEC_CUDA_ARCHS): elsewhere on_hopper() is false, and nothing
// below may be reached.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "ptx.cuh"

#ifdef FRSPEC_EMULATE_CUDA
#include "hopper_emulation.h"
#else

namespace frspec::cuda {

#define FRSPEC_PTX __device__ __forceinline__

#if defined(FRSPEC_HOPPER) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FRSPEC_HOPPER_PTX(...) asm volatile(__VA_ARGS__)
FRSPEC_PTX constexpr bool on_hopper() { return true; }
#else
#define FRSPEC_HOPPER_PTX(...)
FRSPEC_PTX constexpr bool on_hopper() { return false; }
#endif

// True in one thread of the warp, the same one each time; all of them call it. Behind it the
// compiler knows that a copy is asked for once, and does not ask in a loop over threads.
FRSPEC_PTX bool elected() {
  uint32_t chosen = 0;
  FRSPEC_HOPPER_PTX(
      "{\n"
      ".reg .pred one;\n"
      "elect.sync _|one,0xffffffff;\n"
      "selp.b32 %0,1,0,one;\n"
      "}"
      : "=r"(chosen));
  return chosen != 0;
}

// ---- Barriers in shared memory, for one thread that asks and many that wait. A barrier's phase
// ends when the asking thread has arrived and all bytes that it said are there.

FRSPEC_PTX void barrier_init(uint64_t* barrier) {
  FRSPEC_HOPPER_PTX("mbarrier.init.shared::cta.b64 [%0],1;" ::"r"(shared_address(barrier))
                    : "memory");
}
// After the last barrier_init, by the same thread: copies may then use them. Other threads wait
// for __syncthreads(), too.
FRSPEC_PTX void barrier_inits_done() {
  FRSPEC_HOPPER_PTX("fence.mbarrier_init.release.cluster;" ::: "memory");
  FRSPEC_HOPPER_PTX("fence.proxy.async.shared::cta;" ::: "memory");
}
FRSPEC_PTX void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  FRSPEC_HOPPER_PTX(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Phases have parity 0, 1, 0, ...; returns when the current one is not of this parity.
FRSPEC_PTX void barrier_wait(uint64_t* barrier, uint32_t parity) {
  FRSPEC_HOPPER_PTX(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done,[%0],%1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Starts copying the map's box at (column, row) of its matrix to shared memory, a multiple of 1024
// bytes; the barrier gets all bytes of the box. What is outside of the matrix is zeros. By one
// thread.
FRSPEC_PTX void copy_box_async(void* shared, const CUtensorMap& map, int column, int row,
                               uint64_t* barrier) {
  FRSPEC_HOPPER_PTX(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0],[%1,{%2,%3}],[%4];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// What this thread has read of shared memory before may be overwritten by copies that another
// thread asks for behind the next __syncthreads().
FRSPEC_PTX void reads_before_copies() {
  FRSPEC_HOPPER_PTX("fence.proxy.async.shared::cta;" ::: "memory");
}
// The map will be used soon.
FRSPEC_PTX void prefetch_map(const CUtensorMap& map) {
  FRSPEC_HOPPER_PTX("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- Products: four neighbouring warps, the first a multiple of four, multiply 64 rows out of
// shared memory, and go on while they do.
//
//   wgmma_begin();               sums that other instructions wrote are in place
//   wgmma_64xN<T>(sums, a, b);   any number of them; a sum's products are added in this order
//   wgmma_commit();
//   wgmma_wait(sums);            the sums are there, and the operands may be overwritten

FRSPEC_PTX void wgmma_begin() { FRSPEC_HOPPER_PTX("wgmma.fence.sync.aligned;" ::: "memory"); }
FRSPEC_PTX void wgmma_commit() {
  FRSPEC_HOPPER_PTX("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kTiles>
FRSPEC_PTX void wgmma_wait([[maybe_unused]] float (&sums)[kTiles][4]) {
  FRSPEC_HOPPER_PTX("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {  // the compiler does not know that they were written
    FRSPEC_HOPPER_PTX("" : "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3]));
  }
}

// An operand's rows of 128 bytes lie one behind the other from a multiple of 1024 bytes on, the
// 16-byte pieces of row r swizzled: piece p at place p ^ (r & 7). `first` is in row 0 of them, or
// in a row that is a multiple of 8. As in the PTX manual, "Matrix descriptor": address, 1024 bytes
// from 8 rows to the next, both in units of 16 bytes, and the swizzle of 128 bytes (1).
FRSPEC_PTX uint64_t wgmma_operand(const void* first) {
  return uint64_t{(shared_address(first) & 0x3ffffu) >> 4} | uint64_t{1} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#define FRSPEC_SUMS(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define FRSPEC_WGMMA_32(type)                                                                     \
  FRSPEC_HOPPER_PTX("wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                   \
                    " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},%16,%17,1,1,1,0,0;" \
                    : FRSPEC_SUMS(0), FRSPEC_SUMS(1), FRSPEC_SUMS(2), FRSPEC_SUMS(3)              \
                    : "l"(wgmma_operand(a)), "l"(wgmma_operand(b)))
#define FRSPEC_WGMMA_64(type)                                                                  \
  FRSPEC_HOPPER_PTX("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                \
                    " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19," \
                    "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},%32,%33,1,1,1,0,0;"      \
                    : FRSPEC_SUMS(0), FRSPEC_SUMS(1), FRSPEC_SUMS(2), FRSPEC_SUMS(3),          \
                      FRSPEC_SUMS(4), FRSPEC_SUMS(5), FRSPEC_SUMS(6), FRSPEC_SUMS(7)           \
                    : "l"(wgmma_operand(a)), "l"(wgmma_operand(b)))

// D (64 x 8 kTiles, fp32) += A (64x16) . B (16 x 8 kTiles), elements bf16 or fp16; a: the first of
// 16 values of k of the first row of A, b: the same of the first column of B. Warp w of the four
// has rows 16 w ... 16 w + 15 of D; d[j] is of columns 8 j ... 8 j + 7, as mma_16x8x16 has them.
template <typename T, int kTiles>
FRSPEC_PTX void wgmma_64xN([[maybe_unused]] float (&d)[kTiles][4], [[maybe_unused]] const T* a,
                           [[maybe_unused]] const T* b) {
  static_assert(kTiles == 4 || kTiles == 8);
  if constexpr (kTiles == 4) {
    if constexpr (std::is_same_v<T, bf16>) {
      FRSPEC_WGMMA_32("bf16");
    } else {
      FRSPEC_WGMMA_32("f16");
    }
  } else {
    if constexpr (std::is_same_v<T, bf16>) {
      FRSPEC_WGMMA_64("bf16");
    } else {
      FRSPEC_WGMMA_64("f16");
    }
  }
}

#undef FRSPEC_WGMMA_64
#undef FRSPEC_WGMMA_32
#undef FRSPEC_SUMS
#undef FRSPEC_HOPPER_PTX
#undef FRSPEC_PTX

}  // namespace frspec::cuda
#endif
