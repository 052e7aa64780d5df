// The pixels of a tile as SIMD vectors, and what a convex gives each of them.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cpu.h"
#include "convex/math.h"

namespace zoo::convex {

using cpu::larger_part;
using cpu::smaller_part;

// One register: with the two of cpu::Vector a row of a small convex would leave more of them idle.
template <class C>
using Pixels = typename cpu::Register<C>::type;
template <class C>
using Mask = typename cpu::Register<C>::mask;
template <class C>
constexpr int kLanes = sizeof(Pixels<C>) / sizeof(C);

template <class C>
inline Pixels<C> spread(C value) {
  return Pixels<C>{} + value;
}
template <class M>
inline bool any(M mask) {
#ifdef __AVX2__
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  std::int64_t words[4], found = 0;
  std::memcpy(words, &mask, sizeof words);
  for (const std::int64_t word : words) found |= word;
  return found != 0;
#endif
}
template <class C>
inline C sum_lanes(Pixels<C> v) {
  C sum = 0;
  for (int i = 0; i < kLanes<C>; ++i) sum += v[i];
  return sum;
}

// Places in a tile: rows of `across` vectors, the last of which may reach beyond the tile.
template <class C>
struct TileShape {
  int x, y, width, height, tile_size;  // the first pixel, and how many there are within the picture

  int across() const { return (tile_size + kLanes<C> - 1) / kLanes<C>; }
  int vectors() const { return across() * tile_size; }

  // Lanes that are pixels of the tile and the picture.
  Mask<C> existing(int vector) const {
    Mask<C> found{};
    const int row = vector / across(), first = vector % across() * kLanes<C>;
    for (int i = 0; i < kLanes<C>; ++i) found[i] = row < height && first + i < width ? -1 : 0;
    return found;
  }
  // Calls body(vector, lane, pixel of the picture) for each of its pixels.
  template <class Body>
  void each_pixel(int picture_width, Body&& body) const {
    for (int row = 0; row < height; ++row)
      for (int column = 0; column < width; ++column)
        body(row * across() + column / kLanes<C>, column % kLanes<C>,
             static_cast<int64_t>(y + row) * picture_width + x + column);
  }
};

// A convex as a tile reads it.
template <class C>
struct Footprint {
  const C* lines;
  int size;
  C sharpness, opacity, limit, centre_u, centre_v;
  int first_row, last_row, first_vector, last_vector;  // within the tile; the last ones are the first beyond
};

// The field where some pixel may see the convex: `hard` if at every pixel one line has all the weight. One is made for a
// tile, as it takes longer to clear than to fill.
template <class C>
struct Field {
  Pixels<C> s[kMostLines], top, sum, phi;
  bool hard;
};

// Terms below e^-16 of the largest change phi by less than the rounding of s does in float, and are left out there.
constexpr float kNegligible = -16;

// phi = log sum_j exp(s_j) at a vector of pixels; false if alpha < 1/255 at all that are wanted.
template <class C>
inline bool evaluate(const Footprint<C>& convex, Pixels<C> u, C v, Mask<C> wanted, Field<C>& field) {
  constexpr bool brief = std::is_same_v<C, float>;
  const C* line = convex.lines;
  field.s[0] = u * line[0] + (line[1] * v + line[2]);
  Pixels<C> top = field.s[0], second = spread(-std::numeric_limits<C>::infinity());
  for (int j = 1; j < convex.size; ++j) {
    line += 3;
    const Pixels<C> s = field.s[j] = u * line[0] + (line[1] * v + line[2]);
    if constexpr (brief) second = larger_part(second, smaller_part(top, s));
    top = larger_part(top, s);
  }
  wanted &= top <= convex.limit;
  if (!any(wanted)) return false;
  field.top = top;
  field.hard = brief && !any(wanted & (second > top + C(kNegligible)));
  if (field.hard) {
    field.phi = top, field.sum = spread(C(1));
    return true;
  }
  const Pixels<C> least = spread(brief ? C(kNegligible) : cpu::kLeastExponent<C>);
  Pixels<C> sum{};
  for (int j = 0; j < convex.size; ++j) {
    const Pixels<C> below = field.s[j] - top;
    if (brief && !any(wanted & (below > least))) {
      field.s[j] = Pixels<C>{};
      continue;
    }
    sum += field.s[j] = cpu::exponential_of<C>(below, least);
  }
  // Where nothing is wanted the term of the top line may have been left out, too: no NaN may come of that.
  field.sum = larger_part(sum, spread(C(1)));
  field.phi = top + cpu::logarithm_of<C>(field.sum);
  return true;
}

// sigmoid(-t); far outside t is held back, where the result would be a denormal number, slow and not to be seen.
template <class C>
inline Pixels<C> indicator(const Footprint<C>& convex, const Field<C>& field) {
  constexpr C most = std::is_same_v<C, float> ? C(kMostExponent) : C(700);
  return cpu::sigmoid_of<C>(-smaller_part(field.phi * convex.sharpness, spread(most)));
}

}  // namespace zoo::convex
