// EvoNorm S0, S1 and S2 for one storage type (ZOO_SCALAR).
//
// <op>_slab     a block a group of a sample, a contiguous slab of planes that waits in shared memory between its passes
// <op>_planes   passes of their own over [N, C, L], for slabs that do not fit
// <op>_pixels   the same over [N, L, C], where a group is scattered
//
// Bytes moved for n elements of e bytes, and the time for [128, 256, 56, 56] in bfloat16 (206 MB) at the 2.84 TB/s (two
// tensors) and 2.94 TB/s (three) that elementwise kernels reach on an H100:
//
//   slab        forward  x, y        2e n  0.145 ms      backward  x, g, dx          3e n  0.210 ms
//   otherwise   forward  x, x, y     3e n  0.218 ms      backward  x, g, x, g, dx    5e n  0.355 ms
#include "evonorm/layer_s.cuh"
#include "evonorm/passes.cuh"

using S = ZOO_SCALAR;
using C = zoo::compute_t<S>;
using zoo::int64;

namespace {

using namespace zoo;
using namespace zoo::evonorm;

constexpr int kSlabThreads = 512;

// The parts of a group's planes that one block has, its teams of lanes taking turns, and where their packs wait.
struct Slab {
  int64 first_plane;
  int items, slots;  // slots of an item: packs of the longest part, wherever it begins

  __device__ Slab(const Shape& shape, int group_channels)
      : first_plane(static_cast<int64>(blockIdx.x) * group_channels),
        items(group_channels * shape.parts),
        slots((shape.segment + 2 * pack_size<S> - 2) / pack_size<S>) {}

  // Calls body(item, its place in the slab) until every team has had its turns, the same number for all lanes of a warp.
  template <class Body>
  __device__ void each(const Shape& shape, Body&& body) const {
    const int teams = blockDim.x / shape.lanes;
    for (int start = 0; start < items; start += teams) {
      Item item(shape, first_plane * shape.parts + start, first_plane * shape.parts + items);
      body(item, start + static_cast<int>(threadIdx.x) / shape.lanes);
    }
  }
};

}  // namespace

#define ZOO_LAYER                                                                                                     \
  const void *v, const void *weight, const void *bias, int v_dtype, int weight_dtype, int bias_dtype, int per_sample, \
      C *stats, int group_channels, int linear
#define ZOO_LAYER_GIVEN(pull)                                                                                       \
  LayerS<C> {                                                                                                       \
    v, weight, bias, v_dtype, weight_dtype, bias_dtype, per_sample != 0, stats, pull, samples * channels / group_channels, \
        channels, group_channels, linear != 0                                                                       \
  }

// stats [2, groups] is written. Shared: slots * 16 bytes for each of the block's items.
extern "C" __global__ void __launch_bounds__(kSlabThreads)
    evonorm_s_fwd_slab(const S* x, ZOO_SHAPE, ZOO_LAYER, C eps, int mode, S* y) {
  using Buffers = SumBuffers<C, 2>;
  ZOO_SHARED(Buffers, buffers, 1);
  ZOO_DYNAMIC_SHARED(uint4, held);
  const Shape shape = ZOO_SHAPE_GIVEN;
  const Slab slab(shape, group_channels);
  Block<C, 2> team(buffers[0]);
  Spread<C> mine;
  slab.each(shape, [&](const Item& item, int place) {
    const Row<const S> row = item.row(shape, x);
    for (int j = item.rank; j < row.count; j += shape.lanes) {
      const Pack<S> pack = load_pack<S>(row, j);
      held[place * slab.slots + j] = pack.raw;
      mine.add(pack, row.low(j), row.high(j));
    }
  });
  C sums[2] = {mine.count, mine.count * mine.mean};
  team.sum(sums);
  const C count = sums[0];
  C mean = sums[1] / count;
  const C away = mine.mean - mean;
  C around[2] = {mine.squares + mine.count * away * away, mine.count * away};
  team.sum(around);
  correct(mean, around[0], around[1], count);
  C scale = around[0] / count;
  finish_moments(mean, scale, eps, mode);
  if (threadIdx.x == 0) {
    stats[blockIdx.x] = mean;
    stats[gridDim.x + static_cast<int64>(blockIdx.x)] = scale;
  }
  const LayerS<C> layer = ZOO_LAYER_GIVEN(nullptr);
  slab.each(shape, [&](const Item& item, int place) {
    const Row<S> to = item.row(shape, y);
    const auto plane = layer.plane(item.plane / channels, static_cast<int>(item.plane % channels), mean, scale);
    for (int j = item.rank; j < to.count; j += shape.lanes) {
      Pack<S> pack;
      pack.raw = held[place * slab.slots + j];
      for (int i = 0; i < pack_size<S>; ++i) pack.values[i] = narrow(layer.apply(plane, widen(pack.values[i])), S{});
      store_pack<S>(to, j, pack);
    }
  });
}
ZOO_EXPORT(evonorm_s_fwd_slab)

// partial [3, planes, parts]. Shared: twice as much as forward.
extern "C" __global__ void __launch_bounds__(kSlabThreads)
    evonorm_s_bwd_slab(const S* grad, const S* x, ZOO_SHAPE, ZOO_LAYER, C* partial, S* dx) {
  using Buffers = SumBuffers<C, 1>;
  ZOO_SHARED(Buffers, buffers, 1);
  ZOO_DYNAMIC_SHARED(uint4, held);
  const Shape shape = ZOO_SHAPE_GIVEN;
  const Slab slab(shape, group_channels);
  uint4* const held_grad = held + slab.items * slab.slots;
  Block<C, 1> team(buffers[0]);
  LayerS<C> layer = ZOO_LAYER_GIVEN(nullptr);
  const C mean = stats[blockIdx.x], scale = stats[gridDim.x + static_cast<int64>(blockIdx.x)];
  C through[1] = {};  // sum h u over the group
  slab.each(shape, [&](const Item& item, int place) {
    const Row<const S> row = item.row(shape, x), incoming = item.row(shape, grad);
    const auto plane = layer.plane(item.plane / channels, static_cast<int>(item.plane % channels), mean, scale);
    C sums[3] = {};
    for (int j = item.rank; j < row.count; j += shape.lanes) {
      const Pack<S> pack = load_pack<S>(row, j), g = load_pack<S>(incoming, j);
      held[place * slab.slots + j] = pack.raw;
      held_grad[place * slab.slots + j] = g.raw;
      add_pack<S>(layer, plane, pack, g, row.low(j), row.high(j), sums);
    }
    for (int k = 0; k < 3; ++k) {
      const C sum = lane_sum(sums[k], shape.lanes);
      if (!item.exists || item.rank != 0) continue;
      partial[k * shape.planes() * shape.parts + item.index(shape)] = sum;
      if (k == 0) through[0] += plane.gamma * sum;
    }
  });
  team.sum(through);
  const C elements = static_cast<C>(group_channels) * static_cast<C>(length);
  const C pull = through[0] * scale * scale * scale / elements;
  slab.each(shape, [&](const Item& item, int place) {
    const Row<S> to = item.row(shape, dx);
    auto plane = layer.plane(item.plane / channels, static_cast<int>(item.plane % channels), mean, scale);
    plane.pull = pull;
    for (int j = item.rank; j < to.count; j += shape.lanes) {
      Pack<S> pack, g;
      pack.raw = held[place * slab.slots + j];
      g.raw = held_grad[place * slab.slots + j];
      for (int i = 0; i < pack_size<S>; ++i)
        pack.values[i] = narrow(layer.gradient(plane, widen(pack.values[i]), widen(g.values[i])), S{});
      store_pack<S>(to, j, pack);
    }
  });
}
ZOO_EXPORT(evonorm_s_bwd_slab)

#define ZOO_PASSES(layout)                                                                                       \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                         \
      evonorm_s_apply_##layout(const S* x, ZOO_SHAPE, ZOO_LAYER, S* y) {                                         \
    apply_##layout<S>(ZOO_LAYER_GIVEN(nullptr), ZOO_SHAPE_GIVEN, x, y);                                          \
  }                                                                                                              \
  ZOO_EXPORT(evonorm_s_apply_##layout)                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                         \
      evonorm_s_sums_##layout(const S* grad, const S* x, ZOO_SHAPE, ZOO_LAYER, C* partial) {                     \
    sums_##layout<S>(ZOO_LAYER_GIVEN(nullptr), ZOO_SHAPE_GIVEN, grad, x, partial);                               \
  }                                                                                                              \
  ZOO_EXPORT(evonorm_s_sums_##layout)                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                         \
      evonorm_s_grad_##layout(const S* grad, const S* x, ZOO_SHAPE, ZOO_LAYER, const C* pull, S* dx) {           \
    gradient_##layout<S>(ZOO_LAYER_GIVEN(pull), ZOO_SHAPE_GIVEN, grad, x, dx);                                   \
  }                                                                                                              \
  ZOO_EXPORT(evonorm_s_grad_##layout)

ZOO_PASSES(planes)
ZOO_PASSES(pixels)
