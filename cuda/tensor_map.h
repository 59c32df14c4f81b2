// How the copies of Hopper (hopper.cuh) find a box of a matrix in global memory.
#pragma once

#include <cuda.h>

#include "tensor.h"

namespace frspec::cuda {

// A matrix [rows, cols] of 16-bit elements whose rows begin `stride` elements apart, taken in boxes
// of box_rows rows (at most 256) and 64 columns, 128 bytes, in shared memory swizzled as
// wgmma_operand() says. data and rows aligned to 16 bytes. DeviceError where the driver refuses.
CUtensorMap box_map(const void* data, DType dtype, int64_t rows, int64_t cols, int64_t stride,
                    int box_rows);

}  // namespace frspec::cuda
