// The forward kernels: every instance, and the choice among them.
#include "forward.cuh"
#include "launch.cuh"

namespace bnext::cuda {

cudaError_t forward(const ForwardParams& p, const Plan& plan, void* scratch, cudaStream_t stream) {
  const Work work(request(p), plan, scratch);
  return with_type(p.dtype, [&](auto t) {
    return with_tile<decltype(t)>(p.layout, plan, [&](auto tile, auto resident) {
      using Tile = typename decltype(tile)::type;
      constexpr bool kResident = decltype(resident)::value;
      return launch<Forward<Tile, kResident, math::Identity>>(p, plan, work, stream);
    });
  });
}

}  // namespace bnext::cuda
