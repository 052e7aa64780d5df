// How the EvoNorm kernels share out a tensor, and mean and variance that are never a difference of large sums.
//
// x is [N, C, L] ("planes": L neighbours in memory) or [N, L, C] ("pixels": C neighbours). Either way the L positions of a
// plane, one sample's channel, may be cut into `parts` of `segment` positions, so that few large planes fill a GPU. What is
// left of a part goes to [quantity, plane, part]; sums over parts and samples are taken on the host side in a fixed order.
#pragma once

#include "common/rows.cuh"

namespace zoo::evonorm {

constexpr int kThreads = 256;

struct Shape {
  int64 samples;
  int channels, length;  // L
  int parts, segment;
  // Planes: threads of a warp that share a part, a power of two. Pixels: threads of a block side by side along C.
  int lanes;

  ZOO_HD int64 planes() const { return samples * channels; }
  ZOO_HD int width_of(int part) const {
    const int rest = length - part * segment;
    return rest < segment ? rest : segment;
  }
};

// What a kernel is told of the shape, and how it hands it on.
#define ZOO_SHAPE int64 samples, int channels, int length, int parts, int segment, int lanes
#define ZOO_SHAPE_GIVEN \
  zoo::evonorm::Shape { samples, channels, length, parts, segment, lanes }

// Count, mean and sum of squared deviations; combined by the formulas of Chan, Golub and LeVeque.
template <class C>
struct Spread {
  C count = 0, mean = 0, squares = 0;

  ZOO_HD void merge(C other_count, C other_mean, C other_squares) {
    if (other_count == 0) return;
    const C total = count + other_count, delta = other_mean - mean, share = other_count / total;
    mean += delta * share;
    squares += other_squares + delta * delta * count * share;
    count = total;
  }
  // The elements [low, high) of a pack: centred on their own mean first.
  template <class S>
  ZOO_HD void add(const Pack<S>& pack, int low, int high) {
    C sum = 0;
    for (int i = 0; i < pack_size<S>; ++i) sum += i >= low && i < high ? C(widen(pack.values[i])) : C(0);
    const C size = static_cast<C>(high - low), centre = sum / size;
    C around = 0;
    for (int i = 0; i < pack_size<S>; ++i) {
      const C distance = i >= low && i < high ? C(widen(pack.values[i])) - centre : C(0);
      around += distance * distance;
    }
    merge(size, centre, around);
  }
  ZOO_HD C variance() const { return squares / count; }
};

// A mean out of rounded means, and squares around it, once the sum of the distances from it is known; that should be 0.
template <class C>
ZOO_HD void correct(C& mean, C& squares, C distances, C count) {
  const C shift = distances / count;
  mean += shift;
  squares -= shift * distances;
  if (squares < 0) squares = 0;
}

// What becomes of a mean and a variance: themselves; 1 / sqrt(variance + eps); 0 and 1 / sqrt(mean square + eps).
enum Mode : int { kMoments = 0, kDeviation = 1, kRootMeanSquare = 2 };

template <class C>
ZOO_HD void finish_moments(C& mean, C& variance, C eps, int mode) {
  if (mode == kMoments) return;
  if (mode == kRootMeanSquare) {
    variance += mean * mean;
    mean = 0;
  }
  variance = 1 / sqrt(variance + eps);
}

// Sums over the `lanes` neighbours of a warp that share a part; every lane has the result. All 32 lanes must call it.
template <class C>
__device__ __forceinline__ C lane_sum(C value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

// The part of a plane that this thread works on with its neighbours. A warp beyond the end stays for the collectives.
struct Item {
  int rank;  // among the lanes
  bool exists;
  int64 plane;
  int part;

  ZOO_HD Item(const Shape& shape, int64 first_item, int64 items) {
    rank = threadIdx.x % shape.lanes;
    const int64 item = first_item + threadIdx.x / shape.lanes;
    exists = item < items;
    plane = exists ? item / shape.parts : 0;
    part = exists ? static_cast<int>(item % shape.parts) : 0;
  }
  ZOO_HD int64 index(const Shape& shape) const { return plane * shape.parts + part; }
  template <class T>
  ZOO_HD Row<T> row(const Shape& shape, T* tensor) const {
    Row<T> row(shape.width_of(part), tensor, plane * shape.length + static_cast<int64>(part) * shape.segment);
    if (!exists) row.count = 0;
    return row;
  }
};

// The item of a thread when every block takes its share of all of them.
ZOO_HD Item item_of_grid(const Shape& shape) {
  return Item(shape, static_cast<int64>(blockIdx.x) * (blockDim.x / shape.lanes), shape.planes() * shape.parts);
}

// A thread's channels and positions in [N, L, C]: one pack of channels, every `rows`-th position of a part.
template <class S>
struct Tile {
  int64 sample;
  int part, channel, count;  // first channel; how many of a pack exist, 0 beyond the last
  int first, stop, rows;     // positions
  bool whole;                // the pack is complete and aligned

  ZOO_HD explicit Tile(const Shape& shape) {
    const int packs = (shape.channels + pack_size<S> - 1) / pack_size<S>;
    const int columns = (packs + shape.lanes - 1) / shape.lanes;
    const int64 of_sample = static_cast<int64>(shape.parts) * columns;
    sample = blockIdx.x / of_sample;
    const int rest = static_cast<int>(blockIdx.x % of_sample);
    part = rest / columns;
    channel = (rest % columns * shape.lanes + threadIdx.x % shape.lanes) * pack_size<S>;
    const int left = shape.channels - channel;
    count = left < 0 ? 0 : left < pack_size<S> ? left : pack_size<S>;
    rows = blockDim.x / shape.lanes;
    first = part * shape.segment + threadIdx.x / shape.lanes;
    stop = count == 0 ? 0 : part * shape.segment + shape.width_of(part);
    whole = count == pack_size<S> && shape.channels % pack_size<S> == 0;
  }
  ZOO_HD int64 offset(const Shape& shape, int position) const {
    return (sample * shape.length + position) * shape.channels + channel;
  }
  ZOO_HD Pack<S> load(const S* from) const {
    Pack<S> pack;
    if (whole) {
      pack.raw = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int i = 0; i < pack_size<S>; ++i)
        if (i < count) pack.values[i] = from[i];
    }
    return pack;
  }
  ZOO_HD void store(S* to, const Pack<S>& pack) const {
    if (whole) {
      store_16_bytes(to, pack.raw);
    } else {
      for (int i = 0; i < pack_size<S>; ++i)
        if (i < count) to[i] = pack.values[i];
    }
  }
};

// The sums over the positions that the rows of a block have, for every channel; results are in the first row. All threads
// must call it.
template <class S, class C>
__device__ void sum_rows(C (&values)[pack_size<S>], C* buffer, int lanes, int rows) {
  for (int i = 0; i < pack_size<S>; ++i) buffer[threadIdx.x * pack_size<S> + i] = values[i];
  __syncthreads();
  if (threadIdx.x < static_cast<unsigned>(lanes)) {
    for (int i = 0; i < pack_size<S>; ++i) {
      C sum = 0;
      for (int row = 0; row < rows; ++row) sum += buffer[(row * lanes + threadIdx.x) * pack_size<S> + i];
      values[i] = sum;
    }
  }
  __syncthreads();
}

}  // namespace zoo::evonorm
