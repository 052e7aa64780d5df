// Compositing of one tile on the CPU, and its derivative.
//
// Front to back; a vector of pixels is finished when its transmittance would fall below 1e-4. Backwards the
// transmittance before a convex is what is behind it, divided by 1 - alpha >= 0.01.
#pragma once

#include <algorithm>

#include "convex/cpu_pixels.h"

namespace zoo::convex {

template <class C>
struct Raster {
  const C *means2d, *lines, *sharpness, *opacities, *colors, *backgrounds, *limits;
  const int32_t *hull_size, *boxes, *flatten_ids;
  int64_t convexes;
  int most, channels, width, height, tile_size;

  int rows() const { return (height + tile_size - 1) / tile_size; }
  int columns() const { return (width + tile_size - 1) / tile_size; }
  int64_t pixels() const { return static_cast<int64_t>(width) * height; }

  TileShape<C> tile(int64_t of_image) const {
    const int x = static_cast<int>(of_image % columns()) * tile_size;
    const int y = static_cast<int>(of_image / columns()) * tile_size;
    return {x, y, std::min(tile_size, width - x), std::min(tile_size, height - y), tile_size};
  }
  Footprint<C> footprint(int32_t at, const TileShape<C>& tile) const {
    constexpr int lanes = kLanes<C>;
    const int32_t* box = boxes + 4 * static_cast<int64_t>(at);
    const C* centre = means2d + 2 * static_cast<int64_t>(at);
    return {lines + static_cast<int64_t>(at) * most * 3,
            hull_size[at],
            sharpness[at],
            opacities[at],
            limits[at],
            centre[0],
            centre[1],
            std::max(box[2] - tile.y, 0),
            std::min(box[3] - tile.y, tile.height),
            std::max(box[0] - tile.x, 0) / lanes,
            (std::min(box[1] - tile.x, tile.width) + lanes - 1) / lanes};
  }
};

template <class C>
struct Pictures {
  C *colors, *transmittances;
  int32_t* last_ids;  // or nullptr
};

// Calls body(vector, u, v) for the vectors of a tile that a convex may reach; u is relative to its centre.
template <class C, class Body>
inline void each_vector(const Footprint<C>& convex, const TileShape<C>& tile, Body&& body) {
  Pixels<C> steps{};
  for (int i = 0; i < kLanes<C>; ++i) steps[i] = static_cast<C>(i);
  for (int row = convex.first_row; row < convex.last_row; ++row) {
    const C v = static_cast<C>(tile.y + row) + C(0.5) - convex.centre_v;
    for (int k = convex.first_vector; k < convex.last_vector; ++k) {
      const C left = static_cast<C>(tile.x + k * kLanes<C>) + C(0.5) - convex.centre_u;
      body(row * tile.across() + k, steps + left, v);
    }
  }
}

// `list` are the convexes of the tile, `of_image` is its number.
template <class C>
void raster_tile(const Raster<C>& in, const Pictures<C>& out, int64_t image, int64_t of_image, const int32_t* list,
                 int count) {
  const TileShape<C> tile = in.tile(of_image);
  const int vectors = tile.vectors();
  std::vector<Pixels<C>> transmittance(vectors, spread(C(1))), colors(static_cast<size_t>(in.channels) * vectors);
  std::vector<Mask<C>> alive(vectors), last(vectors);
  for (int k = 0; k < vectors; ++k) alive[k] = tile.existing(k);

  Field<C> field;
  bool finished = false;
  for (int at = 0; at < count && !finished; ++at) {
    const Footprint<C> convex = in.footprint(list[at], tile);
    const C* const color = in.colors + static_cast<int64_t>(list[at]) * in.channels;
    bool stopped = false;
    each_vector(convex, tile, [&](int k, Pixels<C> u, C v) {
      if (!any(alive[k]) || !evaluate(convex, u, v, alive[k], field)) return;
      const Pixels<C> alpha = smaller_part(indicator(convex, field) * convex.opacity, spread(C(kMostAlpha)));
      // As a product with 1 - alpha: two opaque convexes in front of each other end at the threshold to the last bit.
      const Pixels<C> before = transmittance[k], after = before * (C(1) - alpha);
      Mask<C> shown = alive[k] & (alpha >= C(kLeastAlpha));
      const Mask<C> ends = shown & (after < C(kLeastTransmittance));
      shown &= ~ends;
      alive[k] &= ~ends;
      stopped = stopped || any(ends);
      const Pixels<C> weight = shown ? alpha * before : Pixels<C>{};
      for (int d = 0; d < in.channels; ++d) colors[static_cast<size_t>(d) * vectors + k] += weight * color[d];
      transmittance[k] = shown ? after : before;
      last[k] = shown ? Mask<C>{} + (at + 1) : last[k];
    });
    if (stopped) finished = std::none_of(alive.begin(), alive.end(), [](Mask<C> mask) { return any(mask); });
  }

  const int64_t first = image * in.pixels();
  tile.each_pixel(in.width, [&](int k, int lane, int64_t pixel) {
    const C left = transmittance[k][lane];
    out.transmittances[first + pixel] = left;
    for (int d = 0; d < in.channels; ++d) {
      C color = colors[static_cast<size_t>(d) * vectors + k][lane];
      if (in.backgrounds != nullptr) color += left * in.backgrounds[image * in.channels + d];
      out.colors[(first + pixel) * in.channels + d] = color;
    }
    if (out.last_ids != nullptr) out.last_ids[first + pixel] = static_cast<int32_t>(last[k][lane]);
  });
}

// Gradients arrive at the picture and leave as one record for each entry of the tile's list: of 3 m numbers of lines,
// sharpness, opacity, colors, and the length of the gradient of a shift on the screen if asked for.
template <class C>
struct Arriving {
  const C *colors, *transmittances_grad;  // or nullptr
  const C* transmittances;
  const int32_t* last_ids;
  bool absgrad;
};

inline int record_width(int most, int channels, bool absgrad) { return 3 * most + 2 + channels + absgrad; }

template <class C>
struct Sums {
  Pixels<C> lines[kMostLines][3], sharpness, opacity, shift;

  void clear(int size) {
    for (int j = 0; j < size; ++j) lines[j][0] = lines[j][1] = lines[j][2] = Pixels<C>{};
    sharpness = opacity = shift = Pixels<C>{};
  }
};

template <class C>
void raster_tile_derivative(const Raster<C>& in, const Arriving<C>& from, int64_t image, int64_t of_image,
                            const int32_t* list, int count, C* records, double* to_background) {
  const TileShape<C> tile = in.tile(of_image);
  const int vectors = tile.vectors(), channels = in.channels, width = record_width(in.most, channels, from.absgrad);
  // Behind each convex: the transmittance, what comes from the convexes there, and from what is left behind all.
  std::vector<Pixels<C>> transmittance(vectors, spread(C(1))), behind(vectors), rest(vectors);
  std::vector<Pixels<C>> grads(static_cast<size_t>(channels) * vectors), of_colors(channels);
  std::vector<Mask<C>> last(vectors);
  int most_last = 0;
  const int64_t first = image * in.pixels();
  tile.each_pixel(in.width, [&](int k, int lane, int64_t pixel) {
    const C left = from.transmittances[first + pixel];
    const int32_t end = from.last_ids[first + pixel];
    C of_left = from.transmittances_grad == nullptr ? C(0) : from.transmittances_grad[first + pixel];
    for (int d = 0; d < channels && from.colors != nullptr; ++d) {
      const C grad = from.colors[(first + pixel) * channels + d];
      grads[static_cast<size_t>(d) * vectors + k][lane] = grad;
      if (in.backgrounds == nullptr) continue;
      of_left += grad * in.backgrounds[image * channels + d];
      to_background[d] += static_cast<double>(left) * grad;
    }
    transmittance[k][lane] = left;
    rest[k][lane] = left * of_left;
    last[k][lane] = end;
    most_last = std::max(most_last, static_cast<int>(end));
  });

  Field<C> field;
  Sums<C> sums;
  std::fill_n(records + static_cast<int64_t>(most_last) * width, static_cast<int64_t>(count - most_last) * width, C(0));
  for (int at = most_last - 1; at >= 0; --at) {
    const Footprint<C> convex = in.footprint(list[at], tile);
    const C* const color = in.colors + static_cast<int64_t>(list[at]) * channels;
    sums.clear(convex.size);
    std::fill(of_colors.begin(), of_colors.end(), Pixels<C>{});
    each_vector(convex, tile, [&](int k, Pixels<C> u, C v) {
      const Mask<C> until = last[k] > at;
      if (!any(until) || !evaluate(convex, u, v, until, field)) return;
      const Pixels<C> inside = indicator(convex, field);
      const Pixels<C> alpha = smaller_part(inside * convex.opacity, spread(C(kMostAlpha)));
      const Mask<C> shown = until & (alpha >= C(kLeastAlpha));
      if (!any(shown)) return;
      const Pixels<C> inverse = C(1) / (C(1) - alpha), before = transmittance[k] * inverse;
      const Pixels<C> weight = shown ? alpha * before : Pixels<C>{};
      Pixels<C> seen{};
      for (int d = 0; d < channels; ++d) {
        const Pixels<C> grad = grads[static_cast<size_t>(d) * vectors + k];
        seen += grad * color[d];
        of_colors[d] += weight * grad;
      }
      const Pixels<C> of_alpha = shown ? before * seen - (rest[k] + behind[k]) * inverse : Pixels<C>{};
      behind[k] += seen * weight;
      transmittance[k] = shown ? before : transmittance[k];

      const Pixels<C> of_indicator = of_alpha * inside;
      sums.opacity += of_indicator;
      const Pixels<C> of_t = of_indicator * (C(1) - inside) * -convex.opacity;
      sums.sharpness += of_t * field.phi;
      const Pixels<C> of_phi = of_t * convex.sharpness, scale = field.hard ? of_phi : of_phi / field.sum;
      Pixels<C> shift_u{}, shift_v{};
      for (int j = 0; j < convex.size; ++j) {
        const Pixels<C> of_s = field.hard ? (field.s[j] == field.top ? scale : Pixels<C>{}) : scale * field.s[j];
        sums.lines[j][0] += of_s * u;
        sums.lines[j][1] += of_s * v;
        sums.lines[j][2] += of_s;
        if (!from.absgrad) continue;
        shift_u += of_s * convex.lines[3 * j];
        shift_v += of_s * convex.lines[3 * j + 1];
      }
      for (int lane = 0; from.absgrad && lane < kLanes<C>; ++lane)
        sums.shift[lane] += std::hypot(shift_u[lane], shift_v[lane]);
    });
    C* record = records + static_cast<int64_t>(at) * width;
    for (int j = 0; j < in.most; ++j)
      for (int i = 0; i < 3; ++i) *record++ = j < convex.size ? sum_lanes<C>(sums.lines[j][i]) : C(0);
    *record++ = sum_lanes<C>(sums.sharpness);
    *record++ = sum_lanes<C>(sums.opacity);
    for (int d = 0; d < channels; ++d) *record++ = sum_lanes<C>(of_colors[d]);
    if (from.absgrad) *record = sum_lanes<C>(sums.shift);
  }
}

}  // namespace zoo::convex
