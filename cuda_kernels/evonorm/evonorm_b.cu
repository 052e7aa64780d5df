// EvoNorm B0, B1 and B2 for one storage type (ZOO_SCALAR) and one layer (ZOO_VARIANT: 0, 1, 2), given the moments of every
// plane and the root of the batch variance.
//
// Bytes moved for n elements of e bytes, and the time for [128, 256, 56, 56] in bfloat16 (206 MB) as in evonorm_s.cu:
// forward with the moments 3e n, 0.218 ms; backward, sums and gradient, 5e n, 0.355 ms.
#include "evonorm/layer_b.cuh"
#include "evonorm/passes.cuh"

using S = ZOO_SCALAR;
using C = zoo::compute_t<S>;
using zoo::int64;

namespace {

using namespace zoo;
using namespace zoo::evonorm;

using Layer = LayerB<ZOO_VARIANT, C>;

}  // namespace

#define ZOO_LAYER                                                                                                     \
  const void *v, const void *weight, const void *bias, int v_dtype, int weight_dtype, int bias_dtype, int per_sample, \
      const C *moments, const C *left, C eps
#define ZOO_LAYER_GIVEN(centre, pull, batch_pull)                                                                 \
  Layer {                                                                                                         \
    v, weight, bias, v_dtype, weight_dtype, bias_dtype, per_sample != 0, moments, left, eps, samples * channels,  \
        channels, centre, pull, batch_pull                                                                        \
  }
#define ZOO_PASSES(layout)                                                                                       \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                         \
      evonorm_b_apply_##layout(const S* x, ZOO_SHAPE, ZOO_LAYER, S* y) {                                         \
    apply_##layout<S>(ZOO_LAYER_GIVEN(nullptr, nullptr, nullptr), ZOO_SHAPE_GIVEN, x, y);                        \
  }                                                                                                              \
  ZOO_EXPORT(evonorm_b_apply_##layout)                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                         \
      evonorm_b_sums_##layout(const S* grad, const S* x, ZOO_SHAPE, ZOO_LAYER, C* partial) {                     \
    sums_##layout<S>(ZOO_LAYER_GIVEN(nullptr, nullptr, nullptr), ZOO_SHAPE_GIVEN, grad, x, partial);             \
  }                                                                                                              \
  ZOO_EXPORT(evonorm_b_sums_##layout)                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                         \
      evonorm_b_grad_##layout(const S* grad, const S* x, ZOO_SHAPE, ZOO_LAYER, const C* centre, const C* pull,   \
                              const C* batch_pull, S* dx) {                                                      \
    gradient_##layout<S>(ZOO_LAYER_GIVEN(centre, pull, batch_pull), ZOO_SHAPE_GIVEN, grad, x, dx);               \
  }                                                                                                              \
  ZOO_EXPORT(evonorm_b_grad_##layout)

ZOO_PASSES(planes)
ZOO_PASSES(pixels)
