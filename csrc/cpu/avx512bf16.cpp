// The unit for bfloat16 on x86-64 with AVX-512 and its BF16 instructions: as avx2.cpp.
#ifdef __x86_64__
#pragma GCC target("f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#define BNEXT_ISA avx512bf16
#define BNEXT_VECTOR_BYTES 64
#define BNEXT_BF16
#include "kernels.inl"
#endif
