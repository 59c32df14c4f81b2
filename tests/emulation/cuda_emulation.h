// The CUDA device language for g++: the kernels of cuda/ run on the CPU, without a GPU, in tests.
// Included in front of every source file (-include), with -x c++ -std=c++20.
//
// Each CUDA thread is a fiber; one OS thread runs one block at a time. A barrier or a warp-wide
// operation is where threads take turns, in an order that Config sets, and where what they agree on
// is checked. README.md says what is noticed and what is not.
#pragma once

// Declares __expf and others in glibc, so it has to come before they are macros.
#include <math.h>

#include <cmath>

// It could be neither poisoned nor checked, and blocks of one kernel would share it.
#define __shared__ _Pragma("GCC error \"use SHARED(T, name, [dimensions]) or SmemCarver\"")
// The toolkit's headers leave these undefined for host compilers.
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __cluster_dims__(...)
#ifndef __grid_constant__
#define __grid_constant__
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "device_functions.h"
#include "device_thread.h"
#include "emulation_config.h"
#include "kernel_launch.h"
#include "warp_functions.h"
