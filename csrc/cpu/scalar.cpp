// The portable unit: 16-byte vectors, which every x86-64 and AArch64 has, and no instruction-set flag.
#define BNEXT_ISA scalar
#define BNEXT_VECTOR_BYTES 16
#include "kernels.inl"
