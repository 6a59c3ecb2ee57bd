// The unit for x86-64 with AVX-512: as avx2.cpp.
#ifdef __x86_64__
#pragma GCC target("f16c,avx512f,avx512bw,avx512dq,avx512vl")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#define BNEXT_ISA avx512
#define BNEXT_VECTOR_BYTES 64
#include "kernels.inl"
#endif
