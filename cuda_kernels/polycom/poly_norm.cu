// Entry points of PolyNorm, or of its gated form, for one storage type and one order.
//
// Defines beside those of entry.cuh: ZOO_GATED (0, 1); how many elements of a row one thread keeps in registers,
// ZOO_FORWARD_ITEMS and ZOO_BACKWARD_ITEMS; the largest blocks, ZOO_FORWARD_THREADS and ZOO_BACKWARD_THREADS. The host
// chooses the width of a team by the same numbers.
#include "polycom/entry.cuh"
#include "polycom/poly_norm.cuh"

namespace {

constexpr int kForwardPacks = ZOO_FORWARD_ITEMS / pack_size<S>, kBackwardPacks = ZOO_BACKWARD_ITEMS / pack_size<S>;
constexpr int kWarpThreads = 256;

}  // namespace

#define ZOO_PROBLEM                                                                                               \
  const S *x, const S *mul, const void *weight, const void *bias, const void *scores, C *stats, int64 rows, int width, \
      int staged, int weight_dtype, int bias_dtype, int scores_dtype, int weight_per_row, int bias_per_row, C count,   \
      C eps, C threshold, C clamp
#define ZOO_PROBLEM_GIVEN                                                                                \
  Problem<S> {                                                                                           \
    x, mul, weight, bias, scores, weight_dtype, bias_dtype, scores_dtype, weight_per_row != 0, bias_per_row != 0, stats, \
        rows, width, staged, count, eps, threshold, clamp                                                \
  }
#define ZOO_FORWARD(name, Team, packs, threads)                                      \
  extern "C" __global__ void __launch_bounds__(threads) name(ZOO_PROBLEM, S* out) {   \
    forward<kOrder, packs, ZOO_GATED != 0, Team>(ZOO_PROBLEM_GIVEN, out);             \
  }                                                                                  \
  ZOO_EXPORT(name)
#define ZOO_BACKWARD(name, Team, packs, threads)                                                             \
  extern "C" __global__ void __launch_bounds__(threads)                                                      \
      name(ZOO_PROBLEM, const S* grad, S* dx, S* dmul, C* partial, C* dweight, C* dbias, C* dscores) {        \
    const Gradients<S> to{dx, dmul, partial, dweight, dbias, dscores};                                       \
    backward<kOrder, packs, ZOO_GATED != 0, Team>(ZOO_PROBLEM_GIVEN, grad, to);                               \
  }                                                                                                          \
  ZOO_EXPORT(name)

ZOO_FORWARD(poly_norm_fwd_warp, Warp, kForwardPacks, kWarpThreads)
ZOO_FORWARD(poly_norm_fwd_block, Block, kForwardPacks, ZOO_FORWARD_THREADS)
ZOO_FORWARD(poly_norm_fwd_loop, Block, 0, ZOO_FORWARD_THREADS)
ZOO_BACKWARD(poly_norm_bwd_warp, Warp, kBackwardPacks, kWarpThreads)
ZOO_BACKWARD(poly_norm_bwd_block, Block, kBackwardPacks, ZOO_BACKWARD_THREADS)
ZOO_BACKWARD(poly_norm_bwd_loop, Block, 0, ZOO_BACKWARD_THREADS)
