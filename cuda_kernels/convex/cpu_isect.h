// Which tiles a convex meets, and the lists of tiles in order of depth, on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "convex/math.h"

namespace zoo::convex {

template <class T>
struct Footprints {
  const T *means2d, *depths, *lines, *limits;
  const int32_t *hull_size, *boxes;
  int64_t convexes;
  int most, width, height, tile_size;

  int rows() const { return (height + tile_size - 1) / tile_size; }
  int columns() const { return (width + tile_size - 1) / tile_size; }

  // Calls body(tile of the image) for every tile that convex `at` meets, row after row.
  template <class Body>
  void each_tile(int64_t at, Body&& body) const {
    if (hull_size[at] == 0) return;
    Line<T> own[kMostLines];
    for (int j = 0; j < hull_size[at]; ++j) {
      const T* line = lines + (at * most + j) * 3;
      own[j] = {line[0], line[1], line[2]};
    }
    const int32_t* box = boxes + 4 * at;
    const int first = box[0] / tile_size, last = (box[1] - 1) / tile_size;
    for (int row = box[2] / tile_size; row <= (box[3] - 1) / tile_size; ++row)
      for (int column = first; column <= last; ++column)
        if (tile_meets(own, hull_size[at], limits[at], means2d[2 * at], means2d[2 * at + 1], column, row, tile_size,
                       width, height))
          body(row * columns() + column);
  }
};

struct Keyed {
  std::uint32_t key;
  std::int32_t index;
};

// Stable, by eleven bits at a time.
inline void sort_by_key(std::vector<Keyed>& all) {
  constexpr int bits = 11, buckets = 1 << bits;
  std::vector<Keyed> other(all.size());
  std::vector<std::size_t> starts(buckets);
  for (int shift = 0; shift < 32; shift += bits) {
    std::fill(starts.begin(), starts.end(), 0);
    for (const Keyed& one : all) ++starts[one.key >> shift & (buckets - 1)];
    std::size_t total = 0;
    for (std::size_t& start : starts) {
      const std::size_t count = start;
      start = total;
      total += count;
    }
    for (const Keyed& one : all) other[starts[one.key >> shift & (buckets - 1)]++] = one;
    all.swap(other);
  }
}

// Convexes that meet a tile of one image, nearest first, ties by index: positive floats sort like their bits.
template <class T>
std::vector<Keyed> by_depth(const Footprints<T>& in, int64_t image, const int32_t* tiles_per_convex) {
  std::vector<Keyed> found;
  for (int64_t n = 0; n < in.convexes; ++n) {
    const int64_t at = image * in.convexes + n;
    if (tiles_per_convex[at] == 0) continue;
    const float depth = static_cast<float>(in.depths[at]);
    std::uint32_t key;
    std::memcpy(&key, &depth, sizeof key);
    found.push_back({key, static_cast<std::int32_t>(at)});
  }
  sort_by_key(found);
  return found;
}

}  // namespace zoo::convex
