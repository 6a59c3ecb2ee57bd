// The backward kernels: every instance, and the choice among them.
#include "backward.cuh"
#include "launch.cuh"

namespace bnext::cuda {

cudaError_t backward(const BackwardParams& p, const Plan& plan, void* scratch, cudaStream_t stream) {
  const Request r = request(p);
  const Work work(r, plan, scratch);
  return with_type(p.dtype, [&](auto t) {
    return with_tile<decltype(t), true>(p.layout, r.after(plan.whole), plan, [&](auto tile, auto resident, auto after) {
      using Tile = typename decltype(tile)::type;
      return launch<Backward<Tile, decltype(resident)::value, decltype(after)::value>>(p, plan, work, stream);
    });
  });
}

}  // namespace bnext::cuda
