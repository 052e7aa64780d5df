// Mean and variance of every plane, and of sets of planes, for one storage type (ZOO_SCALAR).
//
// Bytes moved: x once, and two numbers a part. [128, 256, 56, 56] in bfloat16, 206 MB, at the 2.84 TB/s an H100 reads and
// writes in elementwise kernels: 0.072 ms.
#include "evonorm/spread.cuh"

using S = ZOO_SCALAR;
using C = zoo::compute_t<S>;
using zoo::int64;

namespace {

using namespace zoo;
using namespace zoo::evonorm;

}  // namespace

// out [2, planes, parts]: mean and biased variance of each part.
extern "C" __global__ void __launch_bounds__(kThreads) evonorm_moments_planes(const S* x, ZOO_SHAPE, C* out) {
  const Shape shape = ZOO_SHAPE_GIVEN;
  const Item item = item_of_grid(shape);
  const Row<const S> row = item.row(shape, x);
  Spread<C> mine;
  for (int j = item.rank; j < row.count; j += shape.lanes) mine.add(load_pack<S>(row, j), row.low(j), row.high(j));
  const C count = lane_sum(mine.count, shape.lanes);
  C mean = lane_sum(mine.count * mine.mean, shape.lanes) / count;
  const C away = mine.mean - mean;
  C squares = lane_sum(mine.squares + mine.count * away * away, shape.lanes);
  correct(mean, squares, lane_sum(mine.count * away, shape.lanes), count);
  if (item.exists && item.rank == 0) {
    out[item.index(shape)] = mean;
    out[shape.planes() * shape.parts + item.index(shape)] = squares / count;
  }
}
ZOO_EXPORT(evonorm_moments_planes)

extern "C" __global__ void __launch_bounds__(kThreads) evonorm_moments_pixels(const S* x, ZOO_SHAPE, C* out) {
  ZOO_SHARED(C, buffer, kThreads * pack_size<S>);
  ZOO_SHARED(C, means, kThreads * pack_size<S>);
  const Shape shape = ZOO_SHAPE_GIVEN;
  const Tile<S> tile(shape);
  C count = 0, mean[pack_size<S>] = {}, squares[pack_size<S>] = {};
  for (int p = tile.first; p < tile.stop; p += tile.rows) {
    const Pack<S> pack = tile.load(x + tile.offset(shape, p));
    const C share = 1 / (count += 1);
    for (int i = 0; i < pack_size<S>; ++i) {  // Welford
      const C value = widen(pack.values[i]), delta = value - mean[i];
      mean[i] += delta * share;
      squares[i] += delta * (value - mean[i]);
    }
  }
  const C size = static_cast<C>(shape.width_of(tile.part));
  C sums[pack_size<S>];
  for (int i = 0; i < pack_size<S>; ++i) sums[i] = count * mean[i];
  sum_rows<S>(sums, buffer, shape.lanes, tile.rows);
  const unsigned column = threadIdx.x % shape.lanes;
  if (threadIdx.x == column)
    for (int i = 0; i < pack_size<S>; ++i) means[column * pack_size<S> + i] = sums[i] / size;
  __syncthreads();
  for (int i = 0; i < pack_size<S>; ++i) {
    const C away = mean[i] - means[column * pack_size<S> + i];
    sums[i] = count * away;
    squares[i] += sums[i] * away;
  }
  sum_rows<S>(sums, buffer, shape.lanes, tile.rows);
  sum_rows<S>(squares, buffer, shape.lanes, tile.rows);
  if (threadIdx.x != column) return;
  for (int i = 0; i < pack_size<S>; ++i) {
    if (i >= tile.count) continue;
    const int64 at = (tile.sample * shape.channels + tile.channel + i) * shape.parts + tile.part;
    C centre = means[column * pack_size<S> + i];
    correct(centre, squares[i], sums[i], size);
    out[at] = centre;
    out[shape.planes() * shape.parts + at] = squares[i] / size;
  }
}
ZOO_EXPORT(evonorm_moments_pixels)

// Mean and variance of sets of `members` planes that follow each other, from those of their parts; a warp a set.
//
//   from  [2, sets * members, parts]
//   out   [2, sets], in the form that `mode` names
extern "C" __global__ void __launch_bounds__(kThreads)
    evonorm_merge(const C* from, int64 sets, int members, int length, int parts, int segment, C eps, int mode, C* out) {
  const int64 set = static_cast<int64>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64 whole = static_cast<int64>(members) * parts, all = sets * whole;
  const Shape shape{1, members, length, parts, segment, 32};
  Spread<C> mine;
  if (set < sets) {
    for (int64 k = threadIdx.x % 32; k < whole; k += 32) {
      const C size = static_cast<C>(shape.width_of(static_cast<int>(k % parts)));
      mine.merge(size, from[set * whole + k], from[all + set * whole + k] * size);
    }
  }
  const C count = warp_sum(mine.count);
  C mean = warp_sum(mine.count * mine.mean) / count;
  const C away = mine.mean - mean;
  C squares = warp_sum(mine.squares + mine.count * away * away);
  correct(mean, squares, warp_sum(mine.count * away), count);
  C variance = squares / count;
  finish_moments(mean, variance, eps, mode);
  if (set < sets && threadIdx.x % 32 == 0) {
    out[set] = mean;
    out[sets + set] = variance;
  }
}
ZOO_EXPORT(evonorm_merge)
