// Units compiled for a GPU define BNEXT_DEVICE as __host__ __device__, before they include any other header.
#pragma once

#ifdef BNEXT_DEVICE
#define BNEXT_FUSED true
#else
#define BNEXT_DEVICE
#define BNEXT_FUSED false
#endif

// Before a template that is for host and device and calls what it is given: what that is, nvcc need not check.
#ifdef __CUDACC__
#define BNEXT_ANY_CALLEE _Pragma("nv_exec_check_disable")
#else
#define BNEXT_ANY_CALLEE
#endif
