// Marks a function as usable on the host and in CUDA kernels; plain C++ sees nothing.
#pragma once

#ifdef __CUDACC__
#define FRSPEC_HOST_DEVICE __host__ __device__
#else
#define FRSPEC_HOST_DEVICE
#endif
