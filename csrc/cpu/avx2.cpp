// The unit for x86-64 with AVX2. The flag is this file's alone; what it compiles stays in its own namespace.
#ifdef __x86_64__
#pragma GCC target("avx2,f16c")
#define BNEXT_ISA avx2
#define BNEXT_VECTOR_BYTES 32
#include "kernels.inl"
#endif
