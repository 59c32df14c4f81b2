// Twins of cuda/hopper.cuh, which includes this: barriers that count bytes, copies of boxes, and
// products of warpgroups. Copies are poison until somebody waits for their barrier, products until
// they are waited for, and their operands are read only then.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "cuda_emulation.h"

namespace emulation {

void init_transaction_barrier(uint64_t* barrier);
void expect_bytes(uint64_t* barrier, uint32_t bytes);
void wait_for_transactions(uint64_t* barrier, uint32_t parity);
void copy_box(void* shared, const CUtensorMap& map, int column, int row, uint64_t* barrier);

// What a lane brings to a warp's part of a product: its sums, and where the operands' rows are.
struct WarpProduct {
  float* d;
  int tiles;  // of 8 columns
  bool is_bf16;
  const void* a;
  const void* b;
};
void start_product(void* const* operands, uint32_t mask);
void begin_products(void* const*, uint32_t);
void commit_products(void* const*, uint32_t);
void finish_products(void* const*, uint32_t);

}  // namespace emulation

namespace frspec::cuda {

inline bool on_hopper() { return emulation::config().hopper; }
inline bool elected(emulation::Site site = emulation::Site::current()) {
  emulation::warp_collective([](void* const*, uint32_t) {}, "elected", 0xffffffffu, nullptr, site);
  return threadIdx.x % 32 == 13;  // any would do
}

inline void barrier_init(uint64_t* barrier) { emulation::init_transaction_barrier(barrier); }
inline void barrier_inits_done() {}
inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  emulation::expect_bytes(barrier, bytes);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulation::wait_for_transactions(barrier, parity);
}
inline void copy_box_async(void* shared, const CUtensorMap& map, int column, int row,
                           uint64_t* barrier) {
  emulation::copy_box(shared, map, column, row, barrier);
}

inline void reads_before_copies() {}
inline void prefetch_map(const CUtensorMap&) {}

inline void wgmma_begin(emulation::Site site = emulation::Site::current()) {
  emulation::warp_collective(emulation::begin_products, "wgmma_begin", 0xffffffffu, nullptr, site);
}
inline void wgmma_commit(emulation::Site site = emulation::Site::current()) {
  emulation::warp_collective(emulation::commit_products, "wgmma_commit", 0xffffffffu, nullptr,
                             site);
}
template <int kTiles>
void wgmma_wait(float (&)[kTiles][4], emulation::Site site = emulation::Site::current()) {
  emulation::warp_collective(emulation::finish_products, "wgmma_wait", 0xffffffffu, nullptr, site);
}
template <typename T, int kTiles>
void wgmma_64xN(float (&d)[kTiles][4], const T* a, const T* b,
                emulation::Site site = emulation::Site::current()) {
  static_assert(kTiles == 4 || kTiles == 8);
  emulation::WarpProduct product{&d[0][0], kTiles, std::is_same_v<T, __nv_bfloat16>, a, b};
  emulation::warp_collective(emulation::start_product, "wgmma_64xN", 0xffffffffu, &product, site);
}

}  // namespace frspec::cuda
