// Between torch code and the CUDA units: launches of planned kernels, and what there is to know of a device.
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"

namespace bnext::cuda {

// Of the current device.
cudaError_t query(Device& device);

// Enqueues plan.launches kernels; scratch is device memory of plan.scratch bytes. cudaErrorCooperativeLaunchTooLarge
// or cudaErrorInvalidClusterSize: fewer blocks than planned are resident at once; nothing was launched, and a plan
// without cooperation and clusters will do.
cudaError_t forward(const ForwardParams& p, const Plan& plan, void* scratch, cudaStream_t stream);
cudaError_t backward(const BackwardParams& p, const Plan& plan, void* scratch, cudaStream_t stream);

}  // namespace bnext::cuda
