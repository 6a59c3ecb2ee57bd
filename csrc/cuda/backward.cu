// The backward kernels: every instance, and the choice among them.
#include "backward.cuh"
#include "launch.cuh"

namespace bnext::cuda {

cudaError_t backward(const BackwardParams& p, const Plan& plan, void* scratch, cudaStream_t stream) {
  const Work work(request(p), plan, scratch);
  return with_type(p.dtype, [&](auto t) {
    return with_tile<decltype(t)>(p.layout, plan, [&](auto tile, auto resident) {
      using Tile = typename decltype(tile)::type;
      constexpr bool kResident = decltype(resident)::value;
      return launch<Backward<Tile, kResident>>(p, plan, work, stream);
    });
  });
}

}  // namespace bnext::cuda
