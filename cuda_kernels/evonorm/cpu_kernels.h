// Loops of the EvoNorm layers on a CPU: formulas in math.h, quantities and layouts as zoo/norms/evonorm/eager.py has them.
#pragma once

#include <algorithm>
#include <vector>

#include "common/cpu.h"
#include "evonorm/math.h"

namespace zoo::evonorm {

using cpu::All;
using cpu::for_each_vector;
using cpu::load;
using cpu::load_like;
using cpu::load_or;
using cpu::store;
using cpu::store_like;
using cpu::Vector;
using std::int64_t;

// One parameter of every channel, or of every channel of every sample, in the compute type.
template <class C>
struct Parameter {
  std::vector<C> values;
  bool per_sample = false;

  const C* of(int64_t n, int64_t channels) const { return values.data() + (per_sample ? n * channels : 0); }
};

// A tensor's extents, the same in both layouts.
struct Extents {
  int64_t samples, channels, length;
};

// Mean and biased variance of neighbours in memory: squares of the distances from a first guess, in one pass. Where the
// guess was bad, and their mean not small beside their spread, the difference would lose digits: then once more from there.
template <class S>
void moments_of(const S* x, int64_t size, compute_t<S>& mean, compute_t<S>& variance) {
  using C = compute_t<S>;
  constexpr int unroll = 4;
  const int64_t few = std::min<int64_t>(size, Vector<C>::lanes);
  mean = 0;
  for (int64_t i = 0; i < few; ++i) mean += static_cast<C>(widen(x[i]));
  mean /= static_cast<C>(few);
  for (int turn = 0;; ++turn) {
    const Vector<C> centre = Vector<C>::all(mean);
    Vector<C> sums[unroll], squares[unroll];
    for_each_vector<C, unroll>(0, size, [&](int64_t j, auto count, int u) {
      const Vector<C> away = load_or(x + j, count, mean) - centre;
      sums[u] += away;
      squares[u] += away * away;
    });
    const C count = static_cast<C>(size);
    const C shift = cpu::sum_lanes<C>((sums[0] + sums[1]) + (sums[2] + sums[3])) / count;
    const C around = cpu::sum_lanes<C>((squares[0] + squares[1]) + (squares[2] + squares[3])) / count;
    const C square = shift * shift;
    mean += shift;
    variance = around > square ? around - square : around - around;  // a NaN stays
    if (square <= variance || turn == 2 || !(around < C(1e30))) return;
  }
}

// What an element of an S layer has to know of its channel.
template <class C>
struct LayerS {
  static constexpr int quantities = 3;  // sums of g u, g, g du/dv

  struct Plane {
    Vector<C> v, gamma, beta, mean, r, pull;
  };

  Extents extents;
  int64_t members;  // channels of a group
  Parameter<C> v, gamma, beta;
  const C* stats;  // [2, N, G]
  const C* pull;   // [N, G] or null
  bool linear;

  int64_t groups() const { return extents.channels / members; }
  // Channel c alone, in every lane.
  Plane plane(int64_t n, int64_t c) const {
    const int64_t group = n * groups() + c / members, all = extents.samples * groups();
    const auto of = [&](const Parameter<C>& p) { return Vector<C>::all(p.of(n, extents.channels)[c]); };
    return {of(v),
            of(gamma),
            of(beta),
            Vector<C>::all(stats[group]),
            Vector<C>::all(stats[all + group]),
            Vector<C>::all(pull ? pull[group] : C(0))};
  }
  // Channels c, c + 1, ..., a lane each.
  template <class S>
  Plane planes(int64_t n, int64_t c, int count) const {
    C means[Vector<C>::lanes] = {}, scales[Vector<C>::lanes] = {}, pulls[Vector<C>::lanes] = {};
    for (int i = 0; i < count; ++i) {
      const int64_t group = n * groups() + (c + i) / members;
      means[i] = stats[group];
      scales[i] = stats[extents.samples * groups() + group];
      pulls[i] = pull ? pull[group] : C(0);
    }
    const auto of = [&](const Parameter<C>& p) { return load_like<S>(p.of(n, extents.channels) + c, count); };
    return {of(v), of(gamma), of(beta), load_like<S>(means, count), load_like<S>(scales, count), load_like<S>(pulls, count)};
  }
  Gated<Vector<C>> gate(const Plane& plane, Vector<C> x) const {
    if (linear) return {x, Vector<C>::all(1), Vector<C>{}};
    const Vector<C> z = plane.v * x;
    return gated(x, z, cpu::sigmoid(z));
  }
  Vector<C> apply(const Plane& plane, Vector<C> x) const {
    const Vector<C> u = linear ? x : x * cpu::sigmoid(plane.v * x);
    return plane.gamma * (u * plane.r) + plane.beta;
  }
  void add(const Plane& plane, Vector<C> x, Vector<C> g, Vector<C> (&sums)[quantities]) const {
    const Gated<Vector<C>> at = gate(plane, x);
    sums[0] += g * at.u;
    sums[1] += g;
    sums[2] += g * at.by_v;
  }
  Vector<C> gradient(const Plane& plane, Vector<C> x, Vector<C> g) const {
    return s_gradient(g * plane.gamma, gate(plane, x).slope, x, plane.mean, plane.r, plane.pull);
  }
};

template <int V, class C>
struct LayerB {
  static constexpr int quantities = 5;  // sums of eR (B1: eR (x + 1)), eL, eR x, g x / D, g

  struct Plane {
    Vector<C> v, gamma, beta, left, t, mean, pull, centre, batch_pull;
  };

  Extents extents;
  Parameter<C> v, gamma, beta;
  const C* moments;  // [2, N, C]
  const C* left;     // [C]
  C eps;
  const C *centre, *pull, *batch_pull;  // [C], [N, C], [C] or null

  C root(int64_t at) const {
    const C mean = moments[at], variance = moments[extents.samples * extents.channels + at];
    return std::sqrt((V == kB0 ? variance : variance + mean * mean) + eps);
  }
  Plane plane(int64_t n, int64_t c) const {
    const int64_t at = n * extents.channels + c;
    const auto all = [](C value) { return Vector<C>::all(value); };
    const auto of = [&](const Parameter<C>& p) { return all(p.of(n, extents.channels)[c]); };
    return {of(v), of(gamma), of(beta), all(left[c]), all(root(at)), all(V == kB0 ? moments[at] : C(0)),
            all(pull ? pull[at] : C(0)), all(pull ? centre[c] : C(0)), all(pull ? batch_pull[c] : C(0))};
  }
  template <class S>
  Plane planes(int64_t n, int64_t c, int count) const {
    const int64_t at = n * extents.channels + c;
    C roots[Vector<C>::lanes] = {}, zeros[Vector<C>::lanes] = {};
    for (int i = 0; i < count; ++i) roots[i] = root(at + i);
    const auto like = [&](const C* p) { return load_like<S>(p, count); };
    const auto of = [&](const Parameter<C>& p) { return like(p.of(n, extents.channels) + c); };
    return {of(v), of(gamma), of(beta), like(left + c), like(roots), like(V == kB0 ? moments + at : zeros),
            like(pull ? pull + at : zeros), like(pull ? centre + c : zeros), like(pull ? batch_pull + c : zeros)};
  }
  // 1 / D, and the share of the maximum that is the left side's: 1/2 where both are equal, 0 where one is NaN.
  static Vector<C> inverse(const Plane& plane, Vector<C> x) {
    const Vector<C> other = right<V>(x, plane.v, plane.t);
    // A NaN on either side must come out: the comparison is false for it, and the sum keeps the left one's.
    const Vector<C> largest = cpu::select(plane.left > other, plane.left, other + (plane.left - plane.left));
    return Vector<C>::all(1) / largest;
  }
  static Vector<C> to_left(const Plane& plane, Vector<C> x, Vector<C> e) {
    const Vector<C> other = right<V>(x, plane.v, plane.t), none{};
    const Vector<C> half = cpu::select(plane.left == other, e * C(0.5), none);
    return cpu::select(plane.left > other, e, half);
  }
  Vector<C> apply(const Plane& plane, Vector<C> x) const {
    return plane.gamma * (x * inverse(plane, x)) + plane.beta;
  }
  void add(const Plane& plane, Vector<C> x, Vector<C> g, Vector<C> (&sums)[quantities]) const {
    const Vector<C> over = inverse(plane, x), normed = x * over, e = Vector<C>{} - g * plane.gamma * normed * over;
    const Vector<C> left_part = to_left(plane, x, e), right_part = e - left_part, with_x = right_part * x;
    sums[0] += V == kB1 ? with_x + right_part : right_part;
    sums[1] += left_part;
    sums[2] += with_x;
    sums[3] += g * normed;
    sums[4] += g;
  }
  Vector<C> gradient(const Plane& plane, Vector<C> x, Vector<C> g) const {
    const Vector<C> over = inverse(plane, x), h = g * plane.gamma, e = Vector<C>{} - h * x * over * over;
    const Vector<C> right_part = e - to_left(plane, x, e);
    return b_gradient<V>(h, over, right_part, x, plane.v, plane.t, plane.mean, plane.pull, plane.centre, plane.batch_pull);
  }
};

// [N, C, L]: planes [begin, end) of all samples.

template <class S, class Layer>
void apply_planes(const Layer& layer, const S* x, S* y, int64_t begin, int64_t end) {
  using C = compute_t<S>;
  const auto [samples, channels, length] = layer.extents;
  for (int64_t p = begin; p < end; ++p) {
    const auto plane = layer.plane(p / channels, p % channels);
    const S* from = x + p * length;
    S* to = y + p * length;
    for_each_vector<C, 1>(0, length, [&](int64_t j, auto count, int) {
      store(to + j, layer.apply(plane, load(from + j, count)), count);
    });
  }
}

// sums [quantities, N, C]. Lanes beyond the end hold x = 0 and g = 0, which add nothing.
template <class S, class Layer>
void sums_planes(const Layer& layer, const S* grad, const S* x, compute_t<S>* sums, int64_t begin, int64_t end) {
  using C = compute_t<S>;
  const auto [samples, channels, length] = layer.extents;
  for (int64_t p = begin; p < end; ++p) {
    const auto plane = layer.plane(p / channels, p % channels);
    const S *from = x + p * length, *g = grad + p * length;
    Vector<C> found[Layer::quantities];
    for_each_vector<C, 1>(0, length, [&](int64_t j, auto count, int) {
      layer.add(plane, load(from + j, count), load(g + j, count), found);
    });
    for (int k = 0; k < Layer::quantities; ++k) sums[k * samples * channels + p] = cpu::sum_lanes<C>(found[k]);
  }
}

template <class S, class Layer>
void gradient_planes(const Layer& layer, const S* grad, const S* x, S* dx, int64_t begin, int64_t end) {
  using C = compute_t<S>;
  const auto [samples, channels, length] = layer.extents;
  for (int64_t p = begin; p < end; ++p) {
    const auto plane = layer.plane(p / channels, p % channels);
    const S *from = x + p * length, *g = grad + p * length;
    S* to = dx + p * length;
    for_each_vector<C, 1>(0, length, [&](int64_t j, auto count, int) {
      store(to + j, layer.gradient(plane, load(from + j, count), load(g + j, count)), count);
    });
  }
}

// moments [2, N, C]
template <class S>
void moments_planes(const Extents& extents, const S* x, compute_t<S>* moments, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p)
    moments_of(x + p * extents.length, extents.length, moments[p], moments[extents.samples * extents.channels + p]);
}

// S layers on [N, C, L]: groups [begin, end) of all samples, each read into cache once.

template <class S>
void s_forward_slabs(LayerS<compute_t<S>> layer, const S* x, S* y, compute_t<S>* stats, compute_t<S> eps, bool rms,
                     int64_t begin, int64_t end) {
  using C = compute_t<S>;
  const int64_t slab = layer.members * layer.extents.length, all = layer.extents.samples * layer.groups();
  for (int64_t k = begin; k < end; ++k) {
    C mean, variance;
    moments_of(x + k * slab, slab, mean, variance);
    if (rms) {
      variance += mean * mean;
      mean = 0;
    }
    stats[k] = mean;
    stats[all + k] = 1 / std::sqrt(variance + eps);
    apply_planes(layer, x, y, k * layer.members, (k + 1) * layer.members);
  }
}

// The slope of the gate waits in cache between the two passes over a group: the exponential is taken once.
template <class S>
void s_backward_slabs(const LayerS<compute_t<S>>& layer, const S* grad, const S* x, S* dx, compute_t<S>* sums,
                      int64_t begin, int64_t end) {
  using C = compute_t<S>;
  const auto [samples, channels, length] = layer.extents;
  const int64_t all = samples * channels, slots = (length + Vector<C>::lanes - 1) / Vector<C>::lanes * Vector<C>::lanes;
  std::vector<C> slopes(layer.members * slots);
  for (int64_t k = begin; k < end; ++k) {
    C through = 0;
    for (int64_t m = 0; m < layer.members; ++m) {
      const int64_t p = k * layer.members + m;
      const auto plane = layer.plane(p / channels, p % channels);
      const S *from = x + p * length, *g = grad + p * length;
      C* slope = slopes.data() + m * slots;
      Vector<C> found[3];
      for_each_vector<C, 1>(0, length, [&](int64_t j, auto count, int) {
        const Vector<C> incoming = load(g + j, count);
        const Gated<Vector<C>> at = layer.gate(plane, load(from + j, count));
        store(slope + j, at.slope);
        found[0] += incoming * at.u;
        found[1] += incoming;
        found[2] += incoming * at.by_v;
      });
      for (int q = 0; q < 3; ++q) sums[q * all + p] = cpu::sum_lanes<C>(found[q]);
      through += plane.gamma.low[0] * sums[p];
    }
    const int64_t first = k * layer.members;
    const C r = layer.stats[samples * layer.groups() + k];
    const Vector<C> pull = Vector<C>::all(through * r * r * r / static_cast<C>(layer.members * length));
    for (int64_t m = 0; m < layer.members; ++m) {
      const int64_t p = first + m;
      const auto plane = layer.plane(p / channels, p % channels);
      const S *from = x + p * length, *g = grad + p * length;
      const C* slope = slopes.data() + m * slots;
      S* to = dx + p * length;
      for_each_vector<C, 1>(0, length, [&](int64_t j, auto count, int) {
        const Vector<C> h = load(g + j, count) * plane.gamma;
        store(to + j, s_gradient(h, load(slope + j), load(from + j, count), plane.mean, plane.r, pull), count);
      });
    }
  }
}

// [N, L, C]: vectors run over channels. A sample is cut into blocks of positions, always the same ones, so that sums over
// them do not depend on who takes which.

constexpr int64_t kElementsPerBlock = 16384;

struct Blocks {
  int64_t positions, count;  // of a block; blocks of a sample

  explicit Blocks(const Extents& extents)
      : positions(std::max<int64_t>(1, kElementsPerBlock / extents.channels)),
        count((extents.length + positions - 1) / positions) {}
};

// Calls body(channel, count of lanes that exist) for every vector of channels.
template <class C, class Body>
inline void for_each_column(int64_t channels, Body&& body) {
  for (int64_t c = 0; c < channels; c += Vector<C>::lanes)
    body(c, static_cast<int>(std::min<int64_t>(Vector<C>::lanes, channels - c)));
}
// Calls body(pointer offset) for every position of a block, with the count as a constant where a vector is whole.
template <class C, class Body>
inline void for_each_position(int64_t first, int64_t last, int64_t channels, int64_t c, int count, Body&& body) {
  if (count == Vector<C>::lanes) {
    for (int64_t p = first; p < last; ++p) body(p * channels + c, All{});
  } else {
    for (int64_t p = first; p < last; ++p) body(p * channels + c, count);
  }
}

template <class S, class Layer>
void apply_pixels(const Layer& layer, const S* x, S* y, int64_t n, int64_t first, int64_t last) {
  using C = compute_t<S>;
  const auto [samples, channels, length] = layer.extents;
  const int64_t start = n * length * channels;
  for_each_column<C>(channels, [&](int64_t c, int lanes) {
    const auto plane = layer.template planes<S>(n, c, lanes);
    for_each_position<C>(first, last, channels, c, lanes, [&](int64_t at, auto count) {
      store(y + start + at, layer.apply(plane, load(x + start + at, count)), count);
    });
  });
}

// partial [quantities, C] of one block
template <class S, class Layer>
void sums_pixels(const Layer& layer, const S* grad, const S* x, compute_t<S>* partial, int64_t n, int64_t first,
                 int64_t last) {
  using C = compute_t<S>;
  const auto [samples, channels, length] = layer.extents;
  const int64_t start = n * length * channels;
  for_each_column<C>(channels, [&](int64_t c, int lanes) {
    const auto plane = layer.template planes<S>(n, c, lanes);
    Vector<C> found[Layer::quantities];
    for_each_position<C>(first, last, channels, c, lanes, [&](int64_t at, auto count) {
      layer.add(plane, load(x + start + at, count), load(grad + start + at, count), found);
    });
    for (int k = 0; k < Layer::quantities; ++k) store_like<S>(partial + k * channels + c, found[k], lanes);
  });
}

template <class S, class Layer>
void gradient_pixels(const Layer& layer, const S* grad, const S* x, S* dx, int64_t n, int64_t first, int64_t last) {
  using C = compute_t<S>;
  const auto [samples, channels, length] = layer.extents;
  const int64_t start = n * length * channels;
  for_each_column<C>(channels, [&](int64_t c, int lanes) {
    const auto plane = layer.template planes<S>(n, c, lanes);
    for_each_position<C>(first, last, channels, c, lanes, [&](int64_t at, auto count) {
      store(dx + start + at, layer.gradient(plane, load(x + start + at, count), load(grad + start + at, count)), count);
    });
  });
}

// partial [2, C] of one block: mean, and sum of squared deviations from it
template <class S>
void moments_pixels(const Extents& extents, const S* x, compute_t<S>* partial, int64_t n, int64_t first, int64_t last) {
  using C = compute_t<S>;
  const int64_t channels = extents.channels;
  const S* sample = x + n * extents.length * channels;
  const C inverse = C(1) / static_cast<C>(last - first);
  for_each_column<C>(channels, [&](int64_t c, int lanes) {
    Vector<C> sum{}, shift{}, squares{};
    for_each_position<C>(first, last, channels, c, lanes,
                         [&](int64_t at, auto count) { sum += load(sample + at, count); });
    const Vector<C> mean = sum * inverse;
    for_each_position<C>(first, last, channels, c, lanes, [&](int64_t at, auto count) {
      const Vector<C> away = load(sample + at, count) - mean;
      shift += away;
      squares += away * away;
    });
    store_like<S>(partial + c, mean + shift * inverse, lanes);
    store_like<S>(partial + channels + c, squares - shift * shift * inverse, lanes);
  });
}

}  // namespace zoo::evonorm
