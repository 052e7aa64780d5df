// The three passes over a tensor that every EvoNorm layer is made of, for both layouts. A layer is a struct with
//
//   Plane                            what an element has to know of its plane, loaded once a part
//   Plane plane(int64 n, int c)
//   C apply(plane, x)                y
//   void add(plane, x, g, sums)      the `quantities` sums over a plane that the backward needs
//   C gradient(plane, x, g)          dx once those are known
//
// Bytes moved for n elements of e bytes: apply 2e n, sums 2e n, gradient 3e n.
#pragma once

#include "evonorm/spread.cuh"

namespace zoo::evonorm {

template <class S, class Layer>
__device__ void apply_planes(const Layer& layer, const Shape& shape, const S* x, S* y) {
  const Item item = item_of_grid(shape);
  const Row<const S> row = item.row(shape, x);
  const Row<S> to = item.row(shape, y);
  const auto plane = layer.plane(item.plane / shape.channels, static_cast<int>(item.plane % shape.channels));
  for (int j = item.rank; j < row.count; j += shape.lanes) {
    Pack<S> pack = load_pack<S>(row, j);
    for (int i = 0; i < pack_size<S>; ++i) pack.values[i] = narrow(layer.apply(plane, widen(pack.values[i])), S{});
    store_pack<S>(to, j, pack);
  }
}

template <class S, class Layer>
__device__ void gradient_planes(const Layer& layer, const Shape& shape, const S* grad, const S* x, S* dx) {
  const Item item = item_of_grid(shape);
  const Row<const S> row = item.row(shape, x), incoming = item.row(shape, grad);
  const Row<S> to = item.row(shape, dx);
  const auto plane = layer.plane(item.plane / shape.channels, static_cast<int>(item.plane % shape.channels));
  for (int j = item.rank; j < row.count; j += shape.lanes) {
    Pack<S> pack = load_pack<S>(row, j);
    const Pack<S> g = load_pack<S>(incoming, j);
    for (int i = 0; i < pack_size<S>; ++i)
      pack.values[i] = narrow(layer.gradient(plane, widen(pack.values[i]), widen(g.values[i])), S{});
    store_pack<S>(to, j, pack);
  }
}

// Elements that a row shares with its neighbours are not its own: they must not enter its sums.
template <class S, class Layer, class Plane, class C>
ZOO_HD void add_pack(const Layer& layer, const Plane& plane, const Pack<S>& x, const Pack<S>& g, int low, int high,
                     C (&sums)[Layer::quantities]) {
  for (int i = 0; i < pack_size<S>; ++i)
    if (i >= low && i < high) layer.add(plane, widen(x.values[i]), widen(g.values[i]), sums);
}

// partial [quantities, planes, parts]
template <class S, class Layer, class C>
__device__ void sums_planes(const Layer& layer, const Shape& shape, const S* grad, const S* x, C* partial) {
  const Item item = item_of_grid(shape);
  const Row<const S> row = item.row(shape, x), incoming = item.row(shape, grad);
  const auto plane = layer.plane(item.plane / shape.channels, static_cast<int>(item.plane % shape.channels));
  C sums[Layer::quantities] = {};
  for (int j = item.rank; j < row.count; j += shape.lanes)
    add_pack<S>(layer, plane, load_pack<S>(row, j), load_pack<S>(incoming, j), row.low(j), row.high(j), sums);
  for (int k = 0; k < Layer::quantities; ++k) {
    const C sum = lane_sum(sums[k], shape.lanes);
    if (item.exists && item.rank == 0) partial[k * shape.planes() * shape.parts + item.index(shape)] = sum;
  }
}

template <class S, class Layer>
__device__ void apply_pixels(const Layer& layer, const Shape& shape, const S* x, S* y) {
  const Tile<S> tile(shape);
  typename Layer::Plane planes[pack_size<S>];
  for (int i = 0; i < pack_size<S>; ++i)
    if (i < tile.count) planes[i] = layer.plane(tile.sample, tile.channel + i);
  for (int p = tile.first; p < tile.stop; p += tile.rows) {
    const int64 at = tile.offset(shape, p);
    Pack<S> pack = tile.load(x + at);
    for (int i = 0; i < pack_size<S>; ++i)
      if (i < tile.count) pack.values[i] = narrow(layer.apply(planes[i], widen(pack.values[i])), S{});
    tile.store(y + at, pack);
  }
}

template <class S, class Layer>
__device__ void gradient_pixels(const Layer& layer, const Shape& shape, const S* grad, const S* x, S* dx) {
  const Tile<S> tile(shape);
  typename Layer::Plane planes[pack_size<S>];
  for (int i = 0; i < pack_size<S>; ++i)
    if (i < tile.count) planes[i] = layer.plane(tile.sample, tile.channel + i);
  for (int p = tile.first; p < tile.stop; p += tile.rows) {
    const int64 at = tile.offset(shape, p);
    Pack<S> pack = tile.load(x + at);
    const Pack<S> g = tile.load(grad + at);
    for (int i = 0; i < pack_size<S>; ++i)
      if (i < tile.count)
        pack.values[i] = narrow(layer.gradient(planes[i], widen(pack.values[i]), widen(g.values[i])), S{});
    tile.store(dx + at, pack);
  }
}

template <class S, class Layer, class C>
__device__ void sums_pixels(const Layer& layer, const Shape& shape, const S* grad, const S* x, C* partial) {
  ZOO_SHARED(C, buffer, kThreads * pack_size<S>);
  const Tile<S> tile(shape);
  typename Layer::Plane planes[pack_size<S>];
  for (int i = 0; i < pack_size<S>; ++i)
    if (i < tile.count) planes[i] = layer.plane(tile.sample, tile.channel + i);
  C sums[pack_size<S>][Layer::quantities] = {};
  for (int p = tile.first; p < tile.stop; p += tile.rows) {
    const int64 at = tile.offset(shape, p);
    const Pack<S> pack = tile.load(x + at), g = tile.load(grad + at);
    for (int i = 0; i < pack_size<S>; ++i)
      if (i < tile.count) layer.add(planes[i], widen(pack.values[i]), widen(g.values[i]), sums[i]);
  }
#pragma unroll  // so that the sums stay in registers
  for (int k = 0; k < Layer::quantities; ++k) {
    C values[pack_size<S>];
    for (int i = 0; i < pack_size<S>; ++i) values[i] = sums[i][k];
    sum_rows<S>(values, buffer, shape.lanes, tile.rows);
    if (threadIdx.x >= static_cast<unsigned>(shape.lanes)) continue;
    for (int i = 0; i < pack_size<S>; ++i) {
      if (i >= tile.count) continue;
      const int64 plane = tile.sample * shape.channels + tile.channel + i;
      partial[(k * shape.planes() + plane) * shape.parts + tile.part] = values[i];
    }
  }
}

}  // namespace zoo::evonorm
