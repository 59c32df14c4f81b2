// Inline PTX, which is nowhere but here and in hopper.cuh. Every wrapper takes generic pointers and
// has an emulated twin in tests/emulation/ptx_emulation.h.
#pragma once

#include "device.cuh"

#ifdef FRSPEC_EMULATE_CUDA
#include "ptx_emulation.h"
#else

namespace frspec::cuda {

#define FRSPEC_PTX __device__ __forceinline__

FRSPEC_PTX uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// D (16x8, fp32) += A (16x16, row-major) . B (16x8, column-major), elements bf16 or fp16. Fragments
// as in the PTX manual, "Matrix fragments for mma.m16n8k16".
template <typename T>
FRSPEC_PTX void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
FRSPEC_PTX void mma_16x8x16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
FRSPEC_PTX void mma_16x8x16<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 8x8 matrices of 16-bit elements out of shared memory: lane l gives the address of row l % 8 of
// matrix l / 8 (16-byte aligned).
FRSPEC_PTX void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
FRSPEC_PTX void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1},[%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
FRSPEC_PTX void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts copying `source_bytes` (0 ... 16) from global to shared memory and zeroing the rest of the
// 16 bytes. Both aligned to 16.
FRSPEC_PTX void copy_async_16(void* shared, const void* global, int source_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(source_bytes)
               : "memory");
}
FRSPEC_PTX void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
FRSPEC_PTX void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 2^x within 2 ulp; subnormal results are 0.
FRSPEC_PTX float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

// Programmatic dependent launch: the kernel behind this one in the stream may start now, and what
// it reads of this one's results it reads after dependency_wait(). Without it (compute capability
// below 9.0, or a launch without the attribute) both do nothing.
FRSPEC_PTX void dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
FRSPEC_PTX void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#undef FRSPEC_PTX

}  // namespace frspec::cuda
#endif
