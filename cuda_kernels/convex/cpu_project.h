// Projection of all convexes on the CPU, and its derivative: loops around math.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "convex/math.h"

namespace zoo::convex {

// Image i shows scene i / cameras.
struct Extent {
  int64_t images, scenes, convexes;
  int points, most;  // of a convex, and lines it may have

  int64_t cameras() const { return scenes == 0 ? 0 : images / scenes; }
};

template <class T>
struct Scene {
  const T *points, *delta, *sigmas, *opacities, *viewmats, *Ks;
  T near, far, reference_focal;
  bool clip;

  Camera<T> camera(int64_t image) const { return camera_of(viewmats + 16 * image, Ks + 9 * image, reference_focal); }
};

template <class T>
struct Projected {
  T *means2d, *depths, *points2d, *lines, *sharpness, *limits;
  int32_t *hull_size, *boxes, *radii;
};

// Never inlined: contracted otherwise in another place, products and sums would round otherwise, and the backward pass
// might decide on another hull than the forward pass.
template <class T, int P>
__attribute__((noinline)) bool project_convex(View<T, P>& view, const Camera<T>& camera, const T* points, int count,
                                              T near, T far, bool clip) {
  return project(view, camera, points, count, near, far, clip);
}

template <class T, int P>
void project_one(const Extent& size, const Scene<T>& in, const Projected<T>& out, const Camera<T>& camera, int64_t image,
                 int64_t convex, int width, int height, T radius_clip) {
  const int64_t own = image / size.cameras() * size.convexes + convex, at = image * size.convexes + convex;
  T* const lines = out.lines + at * size.most * 3;
  T* const points2d = out.points2d + at * size.points * 2;
  std::fill_n(lines, size.most * 3, T(0));
  std::fill_n(points2d, size.points * 2, T(0));
  View<T, P> view;
  Seen<T, P> seen;
  const bool visible = project_convex(view, camera, in.points + own * size.points * 3, size.points, in.near, in.far,
                                      in.clip) &&
                       see(seen, view, camera, in.delta[own], in.sigmas[at], in.opacities[at], width, height, radius_clip);
  if (!visible) {
    out.means2d[2 * at] = out.means2d[2 * at + 1] = out.depths[at] = out.sharpness[at] = out.limits[at] = T(0);
    out.hull_size[at] = out.radii[2 * at] = out.radii[2 * at + 1] = 0;
    std::fill_n(out.boxes + 4 * at, 4, 0);
    return;
  }
  const T u = camera.fx * view.centre.x / view.centre.z + camera.cx;
  const T v = camera.fy * view.centre.y / view.centre.z + camera.cy;
  out.means2d[2 * at] = u, out.means2d[2 * at + 1] = v;
  out.depths[at] = view.centre.z;
  for (int k = 0; k < size.points; ++k) {
    if (!(view.centre.z + view.arms[k].z > in.near)) continue;
    const Vec2<T> on = on_screen(camera, view.centre, view.arms[k]);
    points2d[2 * k] = u + on.u, points2d[2 * k + 1] = v + on.v;
  }
  for (int j = 0; j < view.size; ++j)
    lines[3 * j] = seen.lines[j].a, lines[3 * j + 1] = seen.lines[j].b, lines[3 * j + 2] = seen.lines[j].c;
  out.sharpness[at] = seen.sharpness, out.limits[at] = seen.limit;
  out.hull_size[at] = view.size;
  const int32_t box[4] = {seen.columns.first, seen.columns.last, seen.rows.first, seen.rows.last};
  std::copy_n(box, 4, out.boxes + 4 * at);
  out.radii[2 * at] = seen.radius_u, out.radii[2 * at + 1] = seen.radius_v;
}

// What arrives from each view, [I, N, ...]; nullptr where nothing does.
template <class T>
struct ArrivingGradients {
  const T *means2d, *depths, *points2d, *lines, *sharpness;

  ViewGradients<T> of(const Extent& size, int64_t at) const {
    auto pick = [&](const T* all, int64_t width) { return all == nullptr ? nullptr : all + at * width; };
    return {pick(means2d, 2), pick(depths, 1), pick(points2d, size.points * 2), pick(lines, size.most * 3),
            pick(sharpness, 1)};
  }
};

// The gradients of one convex of a scene from all cameras, one after the other. `to_cameras` [C, 12]: of R and t, in
// double, added to; or nullptr.
template <class T, int P>
void project_derivative(const Extent& size, const Scene<T>& in, const int32_t* hull_size,
                        const ArrivingGradients<T>& grads, bool depth_grad, int64_t scene, int64_t convex, T* to_points,
                        T* to_delta, T* to_sigmas, double* to_cameras) {
  const int64_t own = scene * size.convexes + convex, cameras = size.cameras();
  const T* const points = in.points + own * size.points * 3;
  T of_points[3 * kMostPoints] = {}, of_delta = 0;
  for (int64_t c = 0; c < cameras; ++c) {
    const int64_t image = scene * cameras + c, at = image * size.convexes + convex;
    to_sigmas[at] = 0;
    View<T, P> view;
    const Camera<T> camera = in.camera(image);
    if (hull_size[at] == 0 || !project_convex(view, camera, points, size.points, in.near, in.far, in.clip)) continue;
    Vec3<T> in_camera[kMostPoints] = {};
    view_derivative(view, camera, in.delta[own], in.sigmas[at], in.near, depth_grad, grads.of(size, at), in_camera,
                    of_delta, to_sigmas[at]);
    for (int k = 0; k < size.points; ++k) {
      const Vec3<T> g = in_camera[k], world = camera.turned_back(g);
      of_points[3 * k] += world.x, of_points[3 * k + 1] += world.y, of_points[3 * k + 2] += world.z;
      if (to_cameras == nullptr) continue;
      const T by_row[3] = {g.x, g.y, g.z};
      for (int row = 0; row < 3; ++row) {
        for (int column = 0; column < 3; ++column)
          to_cameras[12 * c + 4 * row + column] += static_cast<double>(by_row[row]) * points[3 * k + column];
        to_cameras[12 * c + 4 * row + 3] += by_row[row];
      }
    }
  }
  std::copy_n(of_points, 3 * size.points, to_points + own * size.points * 3);
  to_delta[own] = of_delta;
}

}  // namespace zoo::convex
