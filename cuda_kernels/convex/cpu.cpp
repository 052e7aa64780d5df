// zoo::convex_project, convex_isect, convex_raster, sh_eval and their derivatives for CPU tensors. Schemas:
// zoo/splat/convex/ops.py and zoo/splat/sh.py; what they promise: eager.py beside the former.
//
// Everything is computed per convex or per tile, and sums over tiles, cameras and convexes have an order that depends
// on the shapes alone: results are the same to the last bit for any number of threads.
#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <tuple>

#include "common/stable.h"
#include "convex/cpu_isect.h"
#include "convex/cpu_project.h"
#include "convex/cpu_raster.h"
#include "convex/sh.h"

namespace {

using namespace zoo;
using namespace zoo::convex;
using namespace zoo::stable;

using Optional = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

constexpr int64_t kConvexesPerTask = 64;   // of projection; also those whose gradients of cameras are added first
constexpr int64_t kMostEntries = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostSide = int64_t{1} << 24, kMostTile = 64;  // pixels

template <class Body>
void parallel(int64_t count, int64_t grain, Body&& body) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// float32 and float64: a hull has no use for fewer digits.
template <class Body>
void for_precision(const Tensor& t, Body&& body) {
  t.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

void check(const Tensor& t, const char* name, ScalarType type, Sizes size) {
  check_contiguous(t, name);
  bool fits = t.dim() == static_cast<int64_t>(size.size()) && t.scalar_type() == type;
  int64_t k = 0;
  for (const int64_t n : size) fits = fits && t.size(k++) == n;
  STD_TORCH_CHECK(fits, name, " does not have the shape and type that zoo/splat/convex/eager.py promises");
}

// What int holds without loss, and what makes a tile.
void check_sizes(int64_t width, int64_t height, int64_t tile_size) {
  STD_TORCH_CHECK(width > 0 && width <= kMostSide && height > 0 && height <= kMostSide,
                  "width and height must lie in [1, 2^24], got ", width, " and ", height);
  STD_TORCH_CHECK(tile_size > 0 && tile_size <= kMostTile, "tile_size must lie in [1, ", kMostTile, "], got ", tile_size);
}

// Numbers of lines, and where asked for boxes, that are read by index.
void check_footprints(const Tensor& hull_size, const Tensor& boxes, int64_t most, int64_t width, int64_t height) {
  const int32_t *sizes = input<int32_t>(hull_size), *box = input<int32_t>(boxes);
  bool fits = true;
  for (int64_t i = 0; i < hull_size.numel(); ++i, box += 4) {
    fits = fits && sizes[i] >= 0 && sizes[i] <= most;
    fits = fits && (sizes[i] == 0 || (0 <= box[0] && box[0] < box[1] && box[1] <= width && 0 <= box[2] &&
                                      box[2] < box[3] && box[3] <= height));
  }
  STD_TORCH_CHECK(fits, "hull_size and boxes must come from convex_project, for a picture of this size");
}

ScalarType floating(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "expected float32 or float64");
  return type;
}

template <class T>
const T* optional_input(const Optional& t) {
  return t.has_value() ? input<T>(*t) : nullptr;
}

// Projection

Extent extent_of(const Tensor& points, const Tensor& sigmas, const Tensor& delta, const Tensor& viewmats,
                 const Tensor& Ks, bool clip) {
  STD_TORCH_CHECK(points.dim() == 4 && sigmas.dim() == 2, "points must be [B, N, K, 3] and sigmas [I, N]");
  const int64_t scenes = points.size(0), images = sigmas.size(0), convexes = points.size(1), k = points.size(2);
  STD_TORCH_CHECK(k >= kLeastPoints && k <= kMostPoints, "a convex has 3 to 8 points, got ", k);
  STD_TORCH_CHECK(scenes == 0 ? images == 0 : images % scenes == 0, "there must be as many cameras for every scene");
  const ScalarType type = floating(points);
  check(points, "points", type, {scenes, convexes, k, 3});
  check(delta, "delta", type, {scenes, convexes});
  check(sigmas, "sigmas", type, {images, convexes});
  check(viewmats, "viewmats", type, {images, 4, 4});
  check(Ks, "Ks", type, {images, 3, 3});
  return {images, scenes, convexes, static_cast<int>(k), most_lines(static_cast<int>(k), clip)};
}

// Calls body(T, capacity): a convex that the near plane may cut needs room for more points.
template <class Body>
void for_capacity(const Tensor& points, bool clip, Body&& body) {
  for_precision(points, [&](auto t) {
    if (clip)
      body(t, std::integral_constant<int, kMostLines>{});
    else
      body(t, std::integral_constant<int, kMostPoints>{});
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> convex_project(
    const Tensor& points, const Tensor& delta, const Tensor& sigmas, const Tensor& opacities, const Tensor& viewmats,
    const Tensor& Ks, int64_t width, int64_t height, double near, double far, double radius_clip,
    double reference_focal, bool clip, bool) {
  const Extent size = extent_of(points, sigmas, delta, viewmats, Ks, clip);
  check_sizes(width, height, 1);
  check(opacities, "opacities", points.scalar_type(), {size.images, size.convexes});
  auto make = [&](std::initializer_list<int64_t> tail, ScalarType type) {
    int64_t all[4] = {size.images, size.convexes, 0, 0};
    std::copy(tail.begin(), tail.end(), all + 2);
    return torch::stable::new_empty(points, torch::headeronly::IntHeaderOnlyArrayRef(all, 2 + tail.size()), type);
  };
  const ScalarType type = points.scalar_type();
  Tensor means2d = make({2}, type), depths = make({}, type), points2d = make({size.points, 2}, type);
  Tensor lines = make({size.most, 3}, type), sharpness = make({}, type), limits = make({}, type);
  Tensor hull_size = make({}, ScalarType::Int), boxes = make({4}, ScalarType::Int), radii = make({2}, ScalarType::Int);
  for_capacity(points, clip, [&](auto t, auto capacity) {
    using T = decltype(t);
    const Scene<T> in{input<T>(points), input<T>(delta), input<T>(sigmas), input<T>(opacities), input<T>(viewmats),
                      input<T>(Ks), static_cast<T>(near), static_cast<T>(far), static_cast<T>(reference_focal), clip};
    const Projected<T> out{output<T>(means2d), output<T>(depths), output<T>(points2d), output<T>(lines),
                           output<T>(sharpness), output<T>(limits), output<int32_t>(hull_size),
                           output<int32_t>(boxes), output<int32_t>(radii)};
    parallel(size.images * size.convexes, kConvexesPerTask, [&](int64_t at) {
      const int64_t image = at / size.convexes;
      project_one<T, capacity>(size, in, out, in.camera(image), image, at % size.convexes, static_cast<int>(width),
                               static_cast<int>(height), static_cast<T>(radius_clip));
    });
  });
  return {means2d, depths, points2d, lines, sharpness, limits, hull_size, boxes, radii};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> convex_project_bwd(
    const Optional& grad_means2d, const Optional& grad_depths, const Optional& grad_points2d,
    const Optional& grad_lines, const Optional& grad_sharpness, const Tensor& points, const Tensor& delta,
    const Tensor& sigmas, const Tensor& viewmats, const Tensor& Ks, const Tensor& lines, const Tensor& hull_size,
    double near, double reference_focal, bool clip, bool depth_grad, bool camera_grad) {
  const Extent size = extent_of(points, sigmas, delta, viewmats, Ks, clip);
  const ScalarType type = points.scalar_type();
  check(hull_size, "hull_size", ScalarType::Int, {size.images, size.convexes});
  check(lines, "lines", type, {size.images, size.convexes, size.most, 3});
  if (grad_means2d.has_value()) check(*grad_means2d, "grad_means2d", type, {size.images, size.convexes, 2});
  if (grad_depths.has_value()) check(*grad_depths, "grad_depths", type, {size.images, size.convexes});
  if (grad_points2d.has_value())
    check(*grad_points2d, "grad_points2d", type, {size.images, size.convexes, size.points, 2});
  if (grad_lines.has_value()) check(*grad_lines, "grad_lines", type, {size.images, size.convexes, size.most, 3});
  if (grad_sharpness.has_value()) check(*grad_sharpness, "grad_sharpness", type, {size.images, size.convexes});
  Tensor to_points = torch::stable::empty_like(points), to_delta = torch::stable::empty_like(delta);
  Tensor to_sigmas = torch::stable::empty_like(sigmas), to_viewmats = torch::stable::empty_like(viewmats);
  for_capacity(points, clip, [&](auto t, auto capacity) {
    using T = decltype(t);
    const T infinity = std::numeric_limits<T>::infinity();
    const Scene<T> in{input<T>(points), input<T>(delta), input<T>(sigmas), nullptr, input<T>(viewmats), input<T>(Ks),
                      static_cast<T>(near), infinity, static_cast<T>(reference_focal), clip};
    const ArrivingGradients<T> grads{optional_input<T>(grad_means2d), optional_input<T>(grad_depths),
                                     optional_input<T>(grad_points2d), optional_input<T>(grad_lines),
                                     optional_input<T>(grad_sharpness)};
    const int64_t tasks = (size.convexes + kConvexesPerTask - 1) / kConvexesPerTask, cameras = size.cameras();
    std::vector<double> to_cameras(camera_grad ? size.scenes * tasks * cameras * 12 : 0);
    parallel(size.scenes * tasks, 1, [&](int64_t task) {
      const int64_t scene = task / tasks, first = task % tasks * kConvexesPerTask;
      for (int64_t n = first; n < std::min(first + kConvexesPerTask, size.convexes); ++n)
        project_derivative<T, capacity>(size, in, input<int32_t>(hull_size), grads, depth_grad, scene, n,
                                        output<T>(to_points), output<T>(to_delta), output<T>(to_sigmas),
                                        camera_grad ? to_cameras.data() + task * cameras * 12 : nullptr);
    });
    T* const viewmat = output<T>(to_viewmats);
    std::fill_n(viewmat, size.images * 16, T(0));
    for (int64_t i = 0; camera_grad && i < size.images * 12; ++i) {
      const int64_t image = i / 12, scene = image / cameras;
      double sum = 0;
      for (int64_t task = 0; task < tasks; ++task)
        sum += to_cameras[((scene * tasks + task) * cameras + image % cameras) * 12 + i % 12];
      viewmat[image * 16 + i % 12] = static_cast<T>(sum);
    }
  });
  return {to_points, to_delta, to_sigmas, to_viewmats};
}

// Intersections

std::tuple<Tensor, Tensor, Tensor> convex_isect(const Tensor& means2d, const Tensor& depths, const Tensor& lines,
                                                const Tensor& limits, const Tensor& hull_size, const Tensor& boxes,
                                                int64_t width, int64_t height, int64_t tile_size) {
  STD_TORCH_CHECK(lines.dim() == 4 && lines.size(2) <= kMostLines, "lines must be [I, N, M, 3]");
  check_sizes(width, height, tile_size);
  const int64_t images = lines.size(0), convexes = lines.size(1), most = lines.size(2);
  const ScalarType type = floating(lines);
  STD_TORCH_CHECK(images * convexes <= kMostEntries, "at most 2^31 - 1 convexes times cameras are rendered at once");
  check(lines, "lines", type, {images, convexes, most, 3});
  check(means2d, "means2d", type, {images, convexes, 2});
  check(depths, "depths", type, {images, convexes});
  check(limits, "limits", type, {images, convexes});
  check(hull_size, "hull_size", ScalarType::Int, {images, convexes});
  check(boxes, "boxes", ScalarType::Int, {images, convexes, 4});
  check_footprints(hull_size, boxes, most, width, height);
  const int64_t rows = (height + tile_size - 1) / tile_size, columns = (width + tile_size - 1) / tile_size;
  Tensor tiles_per_convex = new_like(lines, {images, convexes}, ScalarType::Int);
  Tensor isect_offsets = new_like(lines, {images, rows, columns}, ScalarType::Int);
  int32_t* const per_convex = output<int32_t>(tiles_per_convex);
  int32_t* const offsets = output<int32_t>(isect_offsets);
  std::vector<int32_t> flatten;
  for_precision(lines, [&](auto t) {
    using T = decltype(t);
    const Footprints<T> in{input<T>(means2d), input<T>(depths), input<T>(lines), input<T>(limits),
                           input<int32_t>(hull_size), input<int32_t>(boxes), convexes, static_cast<int>(most),
                           static_cast<int>(width), static_cast<int>(height), static_cast<int>(tile_size)};
    parallel(images * convexes, kConvexesPerTask, [&](int64_t at) {
      int32_t count = 0;
      in.each_tile(at, [&](int) { ++count; });
      per_convex[at] = count;
    });
    const int64_t entries = std::accumulate(per_convex, per_convex + images * convexes, int64_t{0});
    STD_TORCH_CHECK(entries <= kMostEntries, "the convexes meet ", entries,
                    " tiles, more than 2^31 - 1; render fewer cameras at once, or a smaller picture");
    flatten.resize(entries);
    int64_t begin = 0;
    for (int64_t image = 0; image < images; ++image) {
      const std::vector<Keyed> order = by_depth(in, image, per_convex);
      std::vector<int64_t> starts(order.size() + 1);
      for (size_t k = 0; k < order.size(); ++k) starts[k + 1] = starts[k] + per_convex[order[k].index];
      std::vector<int32_t> met(starts.back());
      parallel(static_cast<int64_t>(order.size()), kConvexesPerTask, [&](int64_t k) {
        int32_t* to = met.data() + starts[k];
        in.each_tile(order[k].index, [&](int tile) { *to++ = tile; });
      });
      std::vector<int64_t> next(rows * columns + 1);
      for (const int32_t tile : met) ++next[tile + 1];
      next[0] = begin;
      std::partial_sum(next.begin(), next.end(), next.begin());
      for (int64_t tile = 0; tile < rows * columns; ++tile)
        offsets[image * rows * columns + tile] = static_cast<int32_t>(next[tile]);
      for (size_t k = 0; k < order.size(); ++k)
        for (int64_t i = starts[k]; i < starts[k + 1]; ++i) flatten[next[met[i]]++] = order[k].index;
      begin += starts.back();
    }
  });
  Tensor flatten_ids = new_like(lines, {static_cast<int64_t>(flatten.size())}, ScalarType::Int);
  std::copy(flatten.begin(), flatten.end(), output<int32_t>(flatten_ids));
  return {tiles_per_convex, isect_offsets, flatten_ids};
}

// Compositing

// The tensors that forward and backward read, checked: what is out of range would be read from somewhere else.
struct RasterInputs {
  int64_t images, convexes, most, channels, tiles, entries;
  const Tensor &means2d, &lines, &sharpness, &opacities, &colors;
  const Optional& backgrounds;
  const Tensor &limits, &hull_size, &boxes, &isect_offsets, &flatten_ids;
  int64_t width, height, tile_size;

  void validate() const {
    check_sizes(width, height, tile_size);
    const ScalarType type = floating(colors);
    STD_TORCH_CHECK(most <= kMostLines, "a convex has at most ", kMostLines, " lines, got ", most);
    check(means2d, "means2d", type, {images, convexes, 2});
    check(lines, "lines", type, {images, convexes, most, 3});
    check(sharpness, "sharpness", type, {images, convexes});
    check(opacities, "opacities", type, {images, convexes});
    check(colors, "colors", type, {images, convexes, channels});
    if (backgrounds.has_value()) check(*backgrounds, "backgrounds", type, {images, channels});
    check(limits, "limits", type, {images, convexes});
    check(hull_size, "hull_size", ScalarType::Int, {images, convexes});
    check(boxes, "boxes", ScalarType::Int, {images, convexes, 4});
    const int64_t rows = (height + tile_size - 1) / tile_size, columns = (width + tile_size - 1) / tile_size;
    check(isect_offsets, "isect_offsets", ScalarType::Int, {images, rows, columns});
    check(flatten_ids, "flatten_ids", ScalarType::Int, {entries});
    const int32_t *begins = input<int32_t>(isect_offsets), *ids = input<int32_t>(flatten_ids);
    int64_t before = 0;
    bool fits = images * rows * columns == 0 || begins[0] == 0;
    for (int64_t i = 0; i < images * rows * columns; ++i) {
      fits = fits && begins[i] >= before && begins[i] <= entries;
      before = begins[i];
    }
    for (int64_t i = 0; i < entries; ++i) fits = fits && ids[i] >= 0 && ids[i] < images * convexes;
    STD_TORCH_CHECK(fits, "isect_offsets and flatten_ids must come from convex_isect");
    check_footprints(hull_size, boxes, most, width, height);
  }

  // Entries that a pixel says it has seen, within the list of its tile.
  void check_seen(const Tensor& last_ids) const {
    const int32_t* seen = input<int32_t>(last_ids);
    const int32_t* begins = input<int32_t>(isect_offsets);
    const int64_t rows = isect_offsets.size(1), columns = isect_offsets.size(2), all = images * tiles;
    bool fits = true;
    for (int64_t image = 0; image < images; ++image)
      for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x) {
          const int64_t tile = (image * rows + y / tile_size) * columns + x / tile_size;
          const int64_t end = tile + 1 < all ? begins[tile + 1] : entries;
          const int32_t count = *seen++;
          fits = fits && count >= 0 && count <= end - begins[tile];
        }
    STD_TORCH_CHECK(fits, "last_ids must come from convex_raster with the same isect_offsets");
  }

  template <class C>
  Raster<C> raster() const {
    return {input<C>(means2d), input<C>(lines), input<C>(sharpness), input<C>(opacities), input<C>(colors),
            optional_input<C>(backgrounds), input<C>(limits), input<int32_t>(hull_size), input<int32_t>(boxes),
            input<int32_t>(flatten_ids), convexes, static_cast<int>(most), static_cast<int>(channels),
            static_cast<int>(width), static_cast<int>(height), static_cast<int>(tile_size)};
  }

  // Calls body(image, tile of the image, begin, end) for every tile.
  template <class Body>
  void each_tile(Body&& body) const {
    const int32_t* begins = input<int32_t>(isect_offsets);
    const int64_t all = images * tiles;
    parallel(all, 1, [&](int64_t i) {
      body(i / tiles, i % tiles, int64_t{begins[i]}, i + 1 < all ? int64_t{begins[i + 1]} : entries);
    });
  }
};

RasterInputs raster_inputs(const Tensor& means2d, const Tensor& lines, const Tensor& sharpness, const Tensor& opacities,
                           const Tensor& colors, const Optional& backgrounds, const Tensor& limits,
                           const Tensor& hull_size, const Tensor& boxes, const Tensor& isect_offsets,
                           const Tensor& flatten_ids, int64_t width, int64_t height, int64_t tile_size) {
  STD_TORCH_CHECK(lines.dim() == 4 && colors.dim() == 3 && isect_offsets.dim() == 3 && flatten_ids.dim() == 1,
                  "lines must be [I, N, M, 3], colors [I, N, D], isect_offsets [I, rows, columns], flatten_ids [n]");
  const RasterInputs in{lines.size(0), lines.size(1), lines.size(2), colors.size(2),
                        isect_offsets.size(1) * isect_offsets.size(2), flatten_ids.size(0),
                        means2d, lines, sharpness, opacities, colors, backgrounds, limits, hull_size, boxes,
                        isect_offsets, flatten_ids, width, height, tile_size};
  in.validate();
  return in;
}

std::tuple<Tensor, Tensor, Tensor> convex_raster(
    const Tensor& means2d, const Tensor& lines, const Tensor& sharpness, const Tensor& opacities, const Tensor& colors,
    const Optional& backgrounds, const Optional&, const Tensor& limits, const Tensor& hull_size, const Tensor& boxes,
    const Tensor& isect_offsets, const Tensor& flatten_ids, int64_t width, int64_t height, int64_t tile_size,
    bool keep) {
  const RasterInputs in = raster_inputs(means2d, lines, sharpness, opacities, colors, backgrounds, limits, hull_size,
                                        boxes, isect_offsets, flatten_ids, width, height, tile_size);
  Tensor to_colors = new_compute(colors, {in.images, height, width, in.channels});
  Tensor transmittances = new_compute(colors, {in.images, height, width});
  Tensor last_ids = keep ? new_like(colors, {in.images, height, width}, ScalarType::Int)
                         : new_like(colors, {0}, ScalarType::Int);
  for_precision(colors, [&](auto c) {
    using C = decltype(c);
    const Raster<C> raster = in.raster<C>();
    const Pictures<C> out{output<C>(to_colors), output<C>(transmittances),
                          keep ? output<int32_t>(last_ids) : nullptr};
    in.each_tile([&](int64_t image, int64_t tile, int64_t begin, int64_t end) {
      raster_tile(raster, out, image, tile, raster.flatten_ids + begin, static_cast<int>(end - begin));
    });
  });
  return {to_colors, transmittances, last_ids};
}

// Where the entries of each convex are in the lists of tiles, in ascending order: `starts` by convex.
struct Entries {
  std::vector<int64_t> starts;
  std::vector<int32_t> places;

  Entries(const int32_t* ids, int64_t entries, int64_t convexes) : starts(convexes + 1), places(entries) {
    for (int64_t i = 0; i < entries; ++i) ++starts[ids[i] + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<int64_t> next(starts);
    for (int64_t i = 0; i < entries; ++i) places[next[ids[i]]++] = static_cast<int32_t>(i);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> convex_raster_bwd(
    const Optional& grad_colors, const Optional& grad_transmittances, const Tensor& means2d, const Tensor& lines,
    const Tensor& sharpness, const Tensor& opacities, const Tensor& colors, const Optional& backgrounds,
    const Optional& absgrad, const Tensor& limits, const Tensor& hull_size, const Tensor& boxes,
    const Tensor& isect_offsets, const Tensor& flatten_ids, const Tensor& transmittances, const Tensor& last_ids,
    int64_t width, int64_t height, int64_t tile_size) {
  const RasterInputs in = raster_inputs(means2d, lines, sharpness, opacities, colors, backgrounds, limits, hull_size,
                                        boxes, isect_offsets, flatten_ids, width, height, tile_size);
  const ScalarType type = colors.scalar_type();
  if (grad_colors.has_value()) check(*grad_colors, "grad_colors", type, {in.images, height, width, in.channels});
  if (grad_transmittances.has_value())
    check(*grad_transmittances, "grad_transmittances", type, {in.images, height, width});
  check(transmittances, "transmittances", type, {in.images, height, width});
  check(last_ids, "last_ids", ScalarType::Int, {in.images, height, width});
  in.check_seen(last_ids);
  Tensor to_lines = torch::stable::empty_like(lines), to_sharpness = torch::stable::empty_like(sharpness);
  Tensor to_opacities = torch::stable::empty_like(opacities), to_colors = torch::stable::empty_like(colors);
  Tensor to_backgrounds = backgrounds.has_value() ? torch::stable::empty_like(*backgrounds) : new_compute(colors, {0});
  Tensor to_absgrad = absgrad.has_value() ? torch::stable::empty_like(*absgrad) : new_compute(colors, {0});
  for_precision(colors, [&](auto c) {
    using C = decltype(c);
    const Raster<C> raster = in.raster<C>();
    const Arriving<C> from{optional_input<C>(grad_colors), optional_input<C>(grad_transmittances),
                           input<C>(transmittances), input<int32_t>(last_ids), absgrad.has_value()};
    const int64_t most = in.most, channels = in.channels;
    const int64_t record = record_width(raster.most, raster.channels, from.absgrad);
    const std::unique_ptr<C[]> records(new C[in.entries * record]);
    std::vector<double> of_tiles(backgrounds.has_value() ? in.images * in.tiles * channels : 0);
    in.each_tile([&](int64_t image, int64_t tile, int64_t begin, int64_t end) {
      raster_tile_derivative(raster, from, image, tile, raster.flatten_ids + begin, static_cast<int>(end - begin),
                             records.get() + begin * record,
                             of_tiles.empty() ? nullptr : of_tiles.data() + (image * in.tiles + tile) * channels);
    });

    const Entries entries(raster.flatten_ids, in.entries, in.images * in.convexes);
    parallel(in.images * in.convexes, kConvexesPerTask, [&](int64_t at) {
      std::vector<double> sums(record);
      for (int64_t i = entries.starts[at]; i < entries.starts[at + 1]; ++i) {
        const C* one = records.get() + entries.places[i] * record;
        for (int64_t k = 0; k < record; ++k) sums[k] += one[k];
      }
      const double* from_sums = sums.data();
      auto take = [&](C* to, int64_t count) {
        for (int64_t k = 0; k < count; ++k) to[k] = static_cast<C>(*from_sums++);
      };
      take(output<C>(to_lines) + at * most * 3, most * 3);
      take(output<C>(to_sharpness) + at, 1);
      take(output<C>(to_opacities) + at, 1);
      take(output<C>(to_colors) + at * channels, channels);
      if (from.absgrad) take(output<C>(to_absgrad) + at, 1);
    });
    for (int64_t i = 0; backgrounds.has_value() && i < in.images * channels; ++i) {
      double sum = 0;
      for (int64_t tile = 0; tile < in.tiles; ++tile)
        sum += of_tiles[(i / channels * in.tiles + tile) * channels + i % channels];
      output<C>(to_backgrounds)[i] = static_cast<C>(sum);
    }
  });
  return {to_lines, to_sharpness, to_opacities, to_colors, to_backgrounds, to_absgrad};
}

// Spherical harmonics

struct Harmonics {
  int64_t images, sets, count, basis, channels;
  int degree;

  Harmonics(const Tensor& dirs, const Tensor& coeffs, const Tensor& visible, int64_t degree)
      : degree(static_cast<int>(degree)) {
    STD_TORCH_CHECK(dirs.dim() == 3 && coeffs.dim() == 4, "dirs must be [I, N, 3] and coeffs [J, N, S, D]");
    images = dirs.size(0), count = dirs.size(1);
    sets = coeffs.size(0), basis = coeffs.size(2), channels = coeffs.size(3);
    STD_TORCH_CHECK(degree >= 0 && degree <= kMostDegree && (degree + 1) * (degree + 1) <= basis, "degree must lie in [0, ",
                    kMostDegree, "] and have its (degree + 1)^2 coefficients, got ", degree, " and ", basis);
    STD_TORCH_CHECK(sets == 0 ? images == 0 : images % sets == 0, "as many directions must go with every coefficient");
    const ScalarType type = floating(dirs);
    check(dirs, "dirs", type, {images, count, 3});
    check(coeffs, "coeffs", type, {sets, count, basis, channels});
    check(visible, "visible", ScalarType::Bool, {images, count});
  }

  int used() const { return (degree + 1) * (degree + 1); }
};

// The unit vector, or 0 where there is no direction, and the inverse of the length.
template <class T>
T unit(const T* dir, T* u) {
  const T length = std::sqrt(dir[0] * dir[0] + dir[1] * dir[1] + dir[2] * dir[2]);
  const T inverse = length > T(0) ? T(1) / length : T(0);
  for (int i = 0; i < 3; ++i) u[i] = dir[i] * inverse;
  return inverse;
}

Tensor sh_eval(const Tensor& dirs, const Tensor& coeffs, const Tensor& visible, int64_t degree) {
  const Harmonics in(dirs, coeffs, visible, degree);
  Tensor values = new_compute(dirs, {in.images, in.count, in.channels});
  for_precision(dirs, [&](auto t) {
    using T = decltype(t);
    parallel(in.images * in.count, kConvexesPerTask, [&](int64_t at) {
      T* const to = output<T>(values) + at * in.channels;
      std::fill_n(to, in.channels, T(0));
      if (!input<bool>(visible)[at]) return;
      T u[3], basis[kMostBasis];
      unit(input<T>(dirs) + 3 * at, u);
      sh_basis<T>(in.degree, u[0], u[1], u[2], basis, nullptr);
      const int64_t set = at / in.count / (in.images / in.sets) * in.count + at % in.count;
      const T* from = input<T>(coeffs) + set * in.basis * in.channels;
      for (int i = 0; i < in.used(); ++i)
        for (int64_t d = 0; d < in.channels; ++d) to[d] += basis[i] * from[i * in.channels + d];
    });
  });
  return values;
}

std::tuple<Tensor, Tensor> sh_eval_bwd(const Tensor& grad, const Tensor& dirs, const Tensor& coeffs,
                                       const Tensor& visible, int64_t degree) {
  const Harmonics in(dirs, coeffs, visible, degree);
  check(grad, "grad", dirs.scalar_type(), {in.images, in.count, in.channels});
  Tensor to_dirs = torch::stable::empty_like(dirs), to_coeffs = torch::stable::empty_like(coeffs);
  for_precision(dirs, [&](auto t) {
    using T = decltype(t);
    const int64_t of_set = in.sets == 0 ? 0 : in.images / in.sets;
    parallel(in.sets * in.count, kConvexesPerTask, [&](int64_t at) {
      const T* from = input<T>(coeffs) + at * in.basis * in.channels;
      T* const to = output<T>(to_coeffs) + at * in.basis * in.channels;
      std::fill_n(to, in.basis * in.channels, T(0));
      for (int64_t i = 0; i < of_set; ++i) {
        const int64_t one = (at / in.count * of_set + i) * in.count + at % in.count;
        T* const of_dir = output<T>(to_dirs) + 3 * one;
        of_dir[0] = of_dir[1] = of_dir[2] = 0;
        if (!input<bool>(visible)[one]) continue;
        T u[3], basis[kMostBasis], slope[kMostBasis][3];
        const T inverse = unit(input<T>(dirs) + 3 * one, u);
        sh_basis<T>(in.degree, u[0], u[1], u[2], basis, slope);
        const T* g = input<T>(grad) + one * in.channels;
        for (int k = 0; k < in.used(); ++k) {
          T along = 0;
          for (int64_t d = 0; d < in.channels; ++d) {
            to[k * in.channels + d] += basis[k] * g[d];
            along += from[k * in.channels + d] * g[d];
          }
          for (int axis = 0; axis < 3; ++axis) of_dir[axis] += slope[k][axis] * along;
        }
        normalize_derivative(u, inverse, of_dir);
      }
    });
  });
  return {to_dirs, to_coeffs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoo, CPU, m) {
  m.impl("convex_project", TORCH_BOX(&convex_project));
  m.impl("convex_project_bwd", TORCH_BOX(&convex_project_bwd));
  m.impl("convex_isect", TORCH_BOX(&convex_isect));
  m.impl("convex_raster", TORCH_BOX(&convex_raster));
  m.impl("convex_raster_bwd", TORCH_BOX(&convex_raster_bwd));
  m.impl("sh_eval", TORCH_BOX(&sh_eval));
  m.impl("sh_eval_bwd", TORCH_BOX(&sh_eval_bwd));
}
