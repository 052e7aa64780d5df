// PolyReLU on a GPU for one storage type and one order (entry.cuh): elements, whatever their rows.
//
// Bytes moved for n elements of e bytes, and the time for 4096 x 16384 in bfloat16 at the rates of poly_norm.cuh:
//
//   forward    x, y       2e n   268 MB  0.094 ms
//   backward   x, g, dx   3e n   403 MB  0.137 ms
#include "polycom/entry.cuh"

namespace {

constexpr int kThreads = 256;

ZOO_HD C rectified(C value) { return value <= 0 ? C(0) : value; }  // a NaN stays

// The tensor as packs; only the last one may be incomplete.
struct Flat {
  int64 packs;
  int rest;  // elements of the last pack

  ZOO_HD explicit Flat(int64 elements) : packs((elements + pack_size<S> - 1) / pack_size<S>) {
    rest = static_cast<int>(elements - (packs - 1) * pack_size<S>);
  }
  ZOO_HD Pack<S> load(const S* tensor, int64 j) const {
    Pack<S> pack;
    const S* from = tensor + j * pack_size<S>;
    if (j < packs - 1 || rest == pack_size<S>) {
      pack.raw = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int i = 0; i < pack_size<S>; ++i)
        if (i < rest) pack.values[i] = from[i];
    }
    return pack;
  }
  ZOO_HD void store(S* tensor, int64 j, const Pack<S>& pack) const {
    S* to = tensor + j * pack_size<S>;
    if (j < packs - 1 || rest == pack_size<S>) {
      store_16_bytes(to, pack.raw);
    } else {
      for (int i = 0; i < pack_size<S>; ++i)
        if (i < rest) to[i] = pack.values[i];
    }
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    poly_relu_fwd(const S* x, const void* weight, const void* bias, int weight_dtype, int bias_dtype, int64 elements, S* y) {
  const Flat flat(elements);
  C w[kOrder];
  for (int k = 0; k < kOrder; ++k) w[k] = read_as<C>(weight, weight_dtype, k);
  const C constant = bias ? read_as<C>(bias, bias_dtype, 0) : C(0);
  const int64 step = gridDim.x * static_cast<int64>(kThreads);
  for (int64 j = blockIdx.x * static_cast<int64>(kThreads) + threadIdx.x; j < flat.packs; j += step) {
    const Pack<S> pack = flat.load(x, j);
    Pack<S> result;
    for (int i = 0; i < pack_size<S>; ++i)
      result.values[i] = narrow(polynomial<kOrder>(rectified(widen(pack.values[i])), w, constant, kOrder), S{});
    flat.store(y, j, result);
  }
}
ZOO_EXPORT(poly_relu_fwd)

// partial [order + 1, blocks]: what each block adds to the gradients of the coefficients.
extern "C" __global__ void __launch_bounds__(kThreads)
    poly_relu_bwd(const S* grad, const S* x, const void* weight, int weight_dtype, int64 elements, S* dx, C* partial) {
  using Buffers = SumBuffers<C, kOrder + 1>;
  ZOO_SHARED(Buffers, buffers, 1);
  const Flat flat(elements);
  C slopes[kOrder], sums[kOrder + 1] = {};
  for (int k = 0; k < kOrder; ++k) slopes[k] = C(kOrder - k) * read_as<C>(weight, weight_dtype, k);
  const int64 step = gridDim.x * static_cast<int64>(kThreads);
  for (int64 j = blockIdx.x * static_cast<int64>(kThreads) + threadIdx.x; j < flat.packs; j += step) {
    const Pack<S> pack = flat.load(x, j), incoming = flat.load(grad, j);
    Pack<S> result;
    for (int i = 0; i < pack_size<S>; ++i) {
      const C r = rectified(widen(pack.values[i])), g = widen(incoming.values[i]);
      add_moments<kOrder>(r, g, sums, kOrder);
      // The slope at 0 is 0, as torch has it for relu.
      result.values[i] = narrow(r == 0 ? C(0) : g * polynomial_without_root<kOrder>(r, slopes, kOrder), S{});
    }
    flat.store(dx, j, result);
  }
  Block<C, kOrder + 1> team(buffers[0]);
  team.sum(sums);
  if (threadIdx.x == 0)
    for (int k = 0; k <= kOrder; ++k) partial[k * static_cast<int64>(gridDim.x) + blockIdx.x] = sums[k];
}
ZOO_EXPORT(poly_relu_bwd)
