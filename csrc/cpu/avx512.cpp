// The unit for x86-64 with AVX-512: as avx2.cpp.
#ifdef __x86_64__
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#define BNEXT_ISA avx512
#define BNEXT_SUM_LANES 8
#include "kernels.inl"
#endif
