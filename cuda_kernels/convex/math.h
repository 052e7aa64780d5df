// Projection of smooth convexes (Held et al. 2025, section 3): camera points, hull, lines, support, and their derivatives.
//
// T is float or double, P the capacity for points of one convex. All of a convex lies in screen coordinates relative to
// its projected centre: offsets of lines stay small there, and float is enough far from the middle of the picture.
#pragma once

#include "common/scalar.h"

#ifndef __CUDACC__
#include <math.h>  // log, sqrt and the like of both types, by one name, as in CUDA
#endif

namespace zoo::convex {

constexpr int kLeastPoints = 3, kMostPoints = 8;
constexpr double kLeastScale = 1e-12;  // of A and B, which others are divided by

constexpr double kMostAlpha = 0.99, kLeastAlpha = 1.0 / 255, kLeastTransmittance = 1e-4, kMostExponent = 80;

// Points of a convex of k after the near plane has cut it: with `front` of them before it, each of the others makes one
// with each of those.
ZOO_HD constexpr int most_lines(int k, bool clip) {
  int most = k;
  for (int front = 1; clip && front < k; ++front) most = front * (1 + k - front) > most ? front * (1 + k - front) : most;
  return most;
}
constexpr int kMostLines = most_lines(kMostPoints, true);

template <class T>
struct Vec2 {
  T u, v;
};
template <class T>
struct Vec3 {
  T x, y, z;
};
template <class T>
ZOO_HD Vec3<T> operator-(Vec3<T> a, Vec3<T> b) {
  return {a.x - b.x, a.y - b.y, a.z - b.z};
}
template <class T>
ZOO_HD bool is_finite(T value) {
  return value - value == T(0);
}
template <class T>
ZOO_HD bool is_finite(Vec3<T> a) {
  return is_finite(a.x) && is_finite(a.y) && is_finite(a.z);
}
template <class T>
ZOO_HD T lesser(T a, T b) {
  return b < a ? b : a;
}
template <class T>
ZOO_HD T greater(T a, T b) {
  return a < b ? b : a;
}
template <class T>
ZOO_HD T clamped(T value, T low, T high) {
  return value < low ? low : high < value ? high : value;
}

template <class T>
struct Camera {
  T r[9], t[3];  // world to camera, rows of R
  T fx, fy, cx, cy, kappa;

  ZOO_HD Vec3<T> turned(Vec3<T> p) const {
    return {r[0] * p.x + r[1] * p.y + r[2] * p.z, r[3] * p.x + r[4] * p.y + r[5] * p.z,
            r[6] * p.x + r[7] * p.y + r[8] * p.z};
  }
  ZOO_HD Vec3<T> turned_back(Vec3<T> p) const {
    return {r[0] * p.x + r[3] * p.y + r[6] * p.z, r[1] * p.x + r[4] * p.y + r[7] * p.z,
            r[2] * p.x + r[5] * p.y + r[8] * p.z};
  }
};

// viewmat [4, 4] and K [3, 3]. The reference focal length f makes kappa = f^2 / (fx fy), none (0) makes it 1.
template <class T>
ZOO_HD Camera<T> camera_of(const T* viewmat, const T* K, T reference_focal) {
  Camera<T> camera;
  for (int row = 0; row < 3; ++row) {
    for (int column = 0; column < 3; ++column) camera.r[3 * row + column] = viewmat[4 * row + column];
    camera.t[row] = viewmat[4 * row + 3];
  }
  camera.fx = K[0], camera.fy = K[4], camera.cx = K[2], camera.cy = K[5];
  camera.kappa = reference_focal > T(0) ? reference_focal * reference_focal / (camera.fx * camera.fy) : T(1);
  return camera;
}

// What a convex is seen as: its points from the centre in camera axes, the centre, and the points of the polygon.
template <class T, int P>
struct View {
  Vec3<T> arms[kMostPoints];  // R (p_k - c)
  Vec3<T> centre;             // in camera space; its z is the depth
  int points, count;          // given, and those that are projected: fewer or more than given where the near plane cuts
  Vec3<T> cut[P];             // of the projected points, from the centre
  signed char front[P], back[P];  // what each comes from: a point, or (front, back) where a segment meets the plane
  Vec2<T> screen[P];          // relative to the projected centre, pixels
  int size;                   // of the hull
  // Its vertices, positively oriented, the first one lowest in (u, v); room for two whole chains.
  signed char hull[2 * P];
};

// Relative to the projected centre: u - u_c = fx (e.x - (x_c / z_c) e.z) / z.
template <class T>
ZOO_HD Vec2<T> on_screen(const Camera<T>& camera, Vec3<T> centre, Vec3<T> arm) {
  const T z = centre.z + arm.z;
  return {camera.fx * (arm.x - centre.x / centre.z * arm.z) / z, camera.fy * (arm.y - centre.y / centre.z * arm.z) / z};
}

// The centre and the points from it; false if the convex cannot be seen: not finite, behind the near plane, too far.
template <class T, int P>
ZOO_HD bool look_at(View<T, P>& view, const Camera<T>& camera, const T* points, int count, T near, T far, bool clip) {
  Vec3<T> mean{0, 0, 0};
  for (int k = 0; k < count; ++k) {
    mean.x += points[3 * k];
    mean.y += points[3 * k + 1];
    mean.z += points[3 * k + 2];
  }
  mean = {mean.x / T(count), mean.y / T(count), mean.z / T(count)};
  const Vec3<T> turned = camera.turned(mean);
  view.centre = {turned.x + camera.t[0], turned.y + camera.t[1], turned.z + camera.t[2]};
  view.points = count;
  bool finite = is_finite(view.centre);
  int visible = 0;
  for (int k = 0; k < count; ++k) {
    const Vec3<T> p{points[3 * k], points[3 * k + 1], points[3 * k + 2]};
    view.arms[k] = camera.turned(p - mean);
    finite = finite && is_finite(view.arms[k]);
    visible += view.centre.z + view.arms[k].z > near;
  }
  if (!finite || !(view.centre.z > near) || !(view.centre.z < far)) return false;
  return clip ? visible > 0 : visible == count;
}

// The points of the polygon: those before the near plane, then where segments from them to the others meet it. The hull
// of these is the clipped convex, as its edges are among the segments.
template <class T, int P>
ZOO_HD void cut(View<T, P>& view, T near) {
  view.count = 0;
  for (int k = 0; k < view.points; ++k) {
    if (!(view.centre.z + view.arms[k].z > near)) continue;
    view.cut[view.count] = view.arms[k];
    view.front[view.count] = view.back[view.count] = static_cast<signed char>(k);
    ++view.count;
  }
  if (view.count == view.points) return;
  for (int f = 0; f < view.points; ++f) {
    if (!(view.centre.z + view.arms[f].z > near)) continue;
    for (int g = 0; g < view.points; ++g) {
      if (view.centre.z + view.arms[g].z > near) continue;
      const Vec3<T> a = view.arms[f], b = view.arms[g];
      const T share = (near - view.centre.z - a.z) / (b.z - a.z);
      view.cut[view.count] = {a.x + share * (b.x - a.x), a.y + share * (b.y - a.y), near - view.centre.z};
      view.front[view.count] = static_cast<signed char>(f);
      view.back[view.count] = static_cast<signed char>(g);
      ++view.count;
    }
  }
}

template <class T>
ZOO_HD T cross(Vec2<T> a, Vec2<T> b, Vec2<T> q) {
  return (b.u - a.u) * (q.v - a.v) - (b.v - a.v) * (q.u - a.u);
}

// Strictly convex hull by the monotone chain over points in order of (u, v, index), a total order: ties are harmless.
template <class T, int P>
ZOO_HD void find_hull(View<T, P>& view) {
  signed char order[P];
  for (int k = 0; k < view.count; ++k) {
    int at = k;
    for (; at > 0; --at) {
      const Vec2<T> before = view.screen[static_cast<int>(order[at - 1])], own = view.screen[k];
      if (before.u < own.u || (before.u == own.u && before.v <= own.v)) break;
      order[at] = order[at - 1];
    }
    order[at] = static_cast<signed char>(k);
  }
  signed char* const hull = view.hull;
  int size = 0;
  // The lower chain forwards, the upper one backwards from its end.
  for (int pass = 0; pass < 2; ++pass) {
    const int base = size;
    for (int k = 0; k < view.count; ++k) {
      const signed char next = order[pass == 0 ? k : view.count - 1 - k];
      // Not "<= 0": where coordinates overflow, products are NaN, and nothing may stay.
      while (size - base >= 2 &&
             !(cross(view.screen[static_cast<int>(hull[size - 2])], view.screen[static_cast<int>(hull[size - 1])],
                     view.screen[static_cast<int>(next)]) > T(0)))
        --size;
      hull[size++] = next;
    }
    --size;  // it begins the other chain
  }
  view.size = size <= view.count ? size : 0;  // a sliver whose products round to either sign: in both chains
}

// Twice the area within the hull.
template <class T, int P>
ZOO_HD T doubled_area(const View<T, P>& view) {
  T sum = 0;
  for (int j = 2; j < view.size; ++j)
    sum += cross(view.screen[static_cast<int>(view.hull[0])], view.screen[static_cast<int>(view.hull[j - 1])],
                 view.screen[static_cast<int>(view.hull[j])]);
  return sum;
}

// Projection and hull; false where nothing is to be seen. One function, called by forward and backward alike, so that
// both decide alike.
template <class T, int P>
ZOO_HD bool project(View<T, P>& view, const Camera<T>& camera, const T* points, int count, T near, T far, bool clip) {
  view.size = 0;
  if (!look_at(view, camera, points, count, near, far, clip)) return false;
  cut(view, near);
  for (int k = 0; k < view.count; ++k) view.screen[k] = on_screen(camera, view.centre, view.cut[k]);
  find_hull(view);
  const T area = doubled_area(view);
  return view.size >= 3 && area > T(0) && is_finite(area);
}

// L = a u + b v + c is A times the edge's length times the distance to it, negative inside: not a unit normal.
template <class T>
struct Line {
  T a, b, c;
};

template <class T, int P>
ZOO_HD Line<T> line_of(const View<T, P>& view, int j, T scale) {
  const Vec2<T> a = view.screen[static_cast<int>(view.hull[j])];
  const Vec2<T> b = view.screen[static_cast<int>(view.hull[j + 1 < view.size ? j + 1 : 0])];
  return {scale * (b.v - a.v), scale * (a.u - b.u), scale * (b.u * a.v - a.u * b.v)};
}

// max s_j above which alpha < 1/255 for certain: ln(255 o - 1) / B, with a few last places more.
template <class T>
ZOO_HD T limit_of(T opacity, T sharpness) {
  constexpr T place = sizeof(T) == 8 ? T(2.3e-16) : T(1.2e-7);
  const T exponent = log(T(255) * opacity - T(1));
  return (exponent + T(8) * place * (T(1) + fabs(exponent))) / sharpness;
}

// Support

template <class T>
struct Box {
  T low_u, high_u, low_v, high_v;
};

// How far {q: every a u + b v + c <= limit} reaches in direction (eu, ev): the least a r_i + b r_j over pairs of lines
// with e = a n_i + b n_j, a and b >= 0 (the dual of a linear program with two variables). Pairs that are nearly parallel
// are left out, and rounding is added: the bound stays one.
template <class T>
ZOO_HD T reach(const Line<T>* lines, int count, T limit, T eu, T ev) {
  constexpr T place = sizeof(T) == 8 ? T(2.3e-16) : T(1.2e-7);
  T least = sizeof(T) == 8 ? T(1e300) : T(1e38);
  for (int i = 0; i < count; ++i)
    for (int j = i + 1; j < count; ++j) {
      const Line<T> p = lines[i], q = lines[j];
      const T det = p.a * q.b - p.b * q.a, size = sqrt((p.a * p.a + p.b * p.b) * (q.a * q.a + q.b * q.b));
      if (!(fabs(det) > T(64) * place * size)) continue;
      const T a = (eu * q.b - ev * q.a) / det, b = (ev * p.a - eu * p.b) / det;
      if (!(a >= T(0)) || !(b >= T(0))) continue;
      const T first = a * (limit - p.c), second = b * (limit - q.c);
      const T slack = T(8) * place * (fabs(first) + fabs(second)) * (size / fabs(det));
      least = lesser(least, first + second + slack);
    }
  return least;
}

template <class T>
ZOO_HD Box<T> support_box(const Line<T>* lines, int count, T limit) {
  return {-reach(lines, count, limit, T(-1), T(0)), reach(lines, count, limit, T(1), T(0)),
          -reach(lines, count, limit, T(0), T(-1)), reach(lines, count, limit, T(0), T(1))};
}

// Columns or rows [first, last) of pixels with centres from low to high, within [0, size).
struct Range {
  int first, last;
};
template <class T>
ZOO_HD Range pixels_between(T low, T high, int size) {
  constexpr T margin = T(1.0 / 64);  // for the rounding of pixel coordinates
  const T first = ceil(low - margin - T(0.5)), last = floor(high + margin - T(0.5)) + T(1);
  return {static_cast<int>(clamped(first, T(0), T(size))), static_cast<int>(clamped(last, T(0), T(size)))};
}

// Whether a rectangle of pixel centres, relative to the projected centre, may meet {q: every s_j <= limit}. Count and
// emission of intersections call this one function with the same operands.
template <class T>
ZOO_HD bool meets(const Line<T>* lines, int count, T limit, T low_u, T high_u, T low_v, T high_v) {
  for (int j = 0; j < count; ++j) {
    const Line<T> line = lines[j];
    // In the order pixels add it: rounding is monotone, so that no pixel has less.
    const T of_row = line.b * (line.b > T(0) ? low_v : high_v) + line.c;
    const T least = line.a * (line.a > T(0) ? low_u : high_u) + of_row;
    if (least > limit) return false;
  }
  return true;
}

// The same for a tile of the picture: its pixel centres, cut at the border.
template <class T>
ZOO_HD bool tile_meets(const Line<T>* lines, int count, T limit, T centre_u, T centre_v, int column, int row,
                       int tile_size, int width, int height) {
  const int right = column * tile_size + tile_size, bottom = row * tile_size + tile_size;
  return meets(lines, count, limit, T(column * tile_size) + T(0.5) - centre_u,
               T(right < width ? right : width) - T(0.5) - centre_u, T(row * tile_size) + T(0.5) - centre_v,
               T(bottom < height ? bottom : height) - T(0.5) - centre_v);
}

// All that is kept of a convex in one view.
template <class T, int P>
struct Seen {
  Line<T> lines[P];
  T sharpness, limit;
  Range columns, rows;
  int radius_u, radius_v;
};

template <class T>
ZOO_HD T scale_of(T depth, T delta, T kappa) {
  return greater(depth * delta * kappa, T(kLeastScale));
}
template <class T>
ZOO_HD T sharpness_of(T depth, T sigma) {
  return greater(depth * sigma, T(kLeastScale));
}

// Lines, limit and box of a projected convex; false if no pixel of the picture can show it.
template <class T, int P>
ZOO_HD bool see(Seen<T, P>& seen, const View<T, P>& view, const Camera<T>& camera, T delta, T sigma, T opacity, int width,
                int height, T radius_clip) {
  if (!is_finite(delta) || !is_finite(sigma) || !is_finite(opacity) || !(T(255) * opacity > T(1))) return false;
  const T scale = scale_of(view.centre.z, delta, camera.kappa);
  T sum = 0;
  for (int j = 0; j < view.size; ++j) {
    const Line<T> line = seen.lines[j] = line_of(view, j, scale);
    sum += fabs(line.a) + fabs(line.b) + fabs(line.c);
  }
  seen.sharpness = sharpness_of(view.centre.z, sigma);
  seen.limit = limit_of(opacity, seen.sharpness);
  const Box<T> box = support_box(seen.lines, view.size, seen.limit);
  if (!is_finite(sum) || !is_finite(seen.sharpness) || !(box.low_u <= box.high_u) || !(box.low_v <= box.high_v))
    return false;
  const T u = camera.fx * view.centre.x / view.centre.z + camera.cx;
  const T v = camera.fy * view.centre.y / view.centre.z + camera.cy;
  seen.columns = pixels_between(u + box.low_u, u + box.high_u, width);
  seen.rows = pixels_between(v + box.low_v, v + box.high_v, height);
  const T most = T(2) * sqrt(T(width) * T(width) + T(height) * T(height));
  seen.radius_u = static_cast<int>(ceil(lesser((box.high_u - box.low_u) / T(2), most)));
  seen.radius_v = static_cast<int>(ceil(lesser((box.high_v - box.low_v) / T(2), most)));
  if (T(seen.radius_u) <= radius_clip && T(seen.radius_v) <= radius_clip) return false;
  return seen.columns.first < seen.columns.last && seen.rows.first < seen.rows.last;
}

// Derivatives. Each adds to what it is given.

// Of line j = scale (n, c), for its two ends; g is scale times the gradient of the line.
template <class T>
ZOO_HD void line_derivative(Vec2<T> a, Vec2<T> b, Line<T> g, Vec2<T>& to_a, Vec2<T>& to_b) {
  to_a.u += g.b - g.c * b.v;
  to_a.v += -g.a + g.c * b.u;
  to_b.u += -g.b + g.c * a.v;
  to_b.v += g.a - g.c * a.u;
}

// Of the absolute screen position of a point in camera space.
template <class T>
ZOO_HD Vec3<T> screen_derivative(const Camera<T>& camera, Vec3<T> at, Vec2<T> g) {
  const T x = camera.fx / at.z * g.u, y = camera.fy / at.z * g.v;
  return {x, y, -(at.x * x + at.y * y) / at.z};
}

// Gradients that arrive at one view of a convex; nullptr where there is none.
template <class T>
struct ViewGradients {
  const T *means2d, *depth, *points2d, *lines, *sharpness;
};

// Gradients of the K points in camera space, and of delta and sigma.
template <class T, int P>
ZOO_HD void view_derivative(const View<T, P>& view, const Camera<T>& camera, T delta, T sigma, T near, bool depth_grad,
                            const ViewGradients<T>& grads, Vec3<T>* to_points, T& to_delta, T& to_sigma) {
  const T depth = view.centre.z, share = T(1) / T(view.points);
  const T scale = scale_of(depth, delta, camera.kappa);
  T to_depth = grads.depth == nullptr ? T(0) : *grads.depth;
  if (grads.sharpness != nullptr && depth * sigma > T(kLeastScale)) {
    to_sigma += depth * *grads.sharpness;
    if (depth_grad) to_depth += sigma * *grads.sharpness;
  }
  if (grads.lines != nullptr) {
    Vec2<T> to_screen[P];
    for (int k = 0; k < view.count; ++k) to_screen[k] = {T(0), T(0)};
    T to_scale = 0;
    for (int j = 0; j < view.size; ++j) {
      const Line<T> g{grads.lines[3 * j], grads.lines[3 * j + 1], grads.lines[3 * j + 2]};
      const Line<T> line = line_of(view, j, T(1));  // by the scale: what the line would be without it
      to_scale += line.a * g.a + line.b * g.b + line.c * g.c;
      const int a = view.hull[j], b = view.hull[j + 1 < view.size ? j + 1 : 0];
      line_derivative(view.screen[a], view.screen[b], Line<T>{scale * g.a, scale * g.b, scale * g.c}, to_screen[a],
                      to_screen[b]);
    }
    if (depth * delta * camera.kappa > T(kLeastScale)) {
      to_delta += depth * camera.kappa * to_scale;
      if (depth_grad) to_depth += delta * camera.kappa * to_scale;
    }
    for (int j = 0; j < view.size; ++j) {
      const int k = view.hull[j], f = view.front[k], b = view.back[k];
      const Vec3<T> arm = view.cut[k];
      const Vec3<T> at{view.centre.x + arm.x, view.centre.y + arm.y, view.centre.z + arm.z};
      const Vec3<T> g = screen_derivative(camera, at, to_screen[k]);
      if (f == b) {
        to_points[f] = {to_points[f].x + g.x, to_points[f].y + g.y, to_points[f].z + g.z};
        continue;
      }
      // The point stays on the plane: its z does not move, and x and y slide along the segment.
      const Vec3<T> along = view.arms[b] - view.arms[f];
      const T part = (near - depth - view.arms[f].z) / along.z, slope = (g.x * along.x + g.y * along.y) / along.z;
      const T rest = T(1) - part;
      to_points[f] = {to_points[f].x + rest * g.x, to_points[f].y + rest * g.y, to_points[f].z - rest * slope};
      to_points[b] = {to_points[b].x + part * g.x, to_points[b].y + part * g.y, to_points[b].z - part * slope};
    }
  }
  Vec3<T> to_centre{T(0), T(0), to_depth};
  if (grads.means2d != nullptr) {
    const Vec3<T> g = screen_derivative(camera, view.centre, Vec2<T>{grads.means2d[0], grads.means2d[1]});
    to_centre = {g.x, g.y, g.z + to_depth};
  }
  for (int k = 0; k < view.points; ++k) {
    to_points[k].x += share * to_centre.x;
    to_points[k].y += share * to_centre.y;
    to_points[k].z += share * to_centre.z;
    const Vec3<T> at{view.centre.x + view.arms[k].x, view.centre.y + view.arms[k].y, view.centre.z + view.arms[k].z};
    if (grads.points2d == nullptr || !(at.z > near)) continue;
    const Vec3<T> g = screen_derivative(camera, at, Vec2<T>{grads.points2d[2 * k], grads.points2d[2 * k + 1]});
    to_points[k] = {to_points[k].x + g.x, to_points[k].y + g.y, to_points[k].z + g.z};
  }
}

}  // namespace zoo::convex
