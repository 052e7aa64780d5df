// zoo::evonorm_s with its backward and the kernels of the B layers for CPU tensors. Schemas: evonorm/ops.py; what they
// promise: evonorm/eager.py.
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>

#include "evonorm/cpu_tensors.h"

namespace {

using namespace zoo;
using namespace zoo::evonorm;
using namespace zoo::stable;

constexpr auto ignore = [](auto&&...) {};

// S layers

template <class C>
struct SLayer {
  Parameter<C> v, weight, bias;
  int64_t groups;
  std::vector<int64_t> group_of;  // a channel: where there is one pixel to a channel, divisions count
  C* stats;
  double eps;

  SLayer(const Shape& in, const Optional& v, const Optional& weight, const Optional& bias, const Tensor& stats,
         double eps)
      : v(v, C(1), in, "v", 1),
        weight(weight, C(1), in, "weight"),
        bias(bias, C(0), in, "bias"),
        groups(stats.size(2)),
        group_of(in.channels),
        stats(output<C>(stats)),
        eps(eps) {
    for (int64_t c = 0; c < in.channels; ++c) group_of[c] = c / (in.channels / groups);
  }

  C* mean(int64_t n, int64_t group) const { return stats + n * groups + group; }
  C* root(const Shape& in, int64_t n, int64_t group) const { return stats + (in.samples + n) * groups + group; }
  void set(const Shape& in, int64_t n, int64_t group, const Moments& of) const {
    *mean(n, group) = static_cast<C>(of.mean);
    *root(in, n, group) = static_cast<C>(1 / std::sqrt(of.variance() + eps));
  }
};

template <class S, bool Linear>
void s_forward(const Shape& in, const SLayer<compute_t<S>>& layer, const S* x, S* y, bool rms) {
  using C = compute_t<S>;
  const int64_t of_group = in.channels / layer.groups;
  auto fill = [&](int64_t n, int64_t c, C* of) {
    of[0] = layer.v(0, c);
    of[1] = *layer.root(in, n, layer.group_of[c]) * layer.weight(n, c);
    of[2] = layer.bias(n, c);
  };
  if (in.channels_last) {
    for_samples(in, [&](int64_t n) {
      const S* from = x + n * in.sample();
      const std::vector<Moments> moments = moments_across(in, from, rms);
      for (int64_t group = 0; group < layer.groups; ++group)
        layer.set(in, n, group, Moments::together(&moments[group * of_group], of_group));
      in_sample<S>(in, SApply<S, Linear>{from, y + n * in.sample()}, [&](int64_t c, C* of) { fill(n, c, of); }, ignore);
    });
  } else {
    const int64_t size = of_group * in.length;
    parallel(in.samples * layer.groups, size, [&](int64_t slab) {
      const int64_t n = slab / layer.groups, group = slab % layer.groups;
      layer.set(in, n, group, moments_along(x + slab * size, size, rms));
      const SApply<S, Linear> step{x + slab * size, y + slab * size};
      for (int64_t c = 0; c < of_group; ++c) {
        C of[3];
        fill(n, group * of_group + c, of);
        along(step, of, c * in.length, in.length, nullptr);
      }
    });
  }
}

// `sums` [3, N, C]: of g u, g and g du/dv.
template <class S, bool Linear>
void s_backward(const Shape& in, const SLayer<compute_t<S>>& layer, const S* grad, const S* x, S* dx,
                compute_t<S>* sums) {
  using C = compute_t<S>;
  const int64_t of_group = in.channels / layer.groups, size = of_group * in.length;
  auto fill = [&](int64_t n, int64_t c, C* of) {
    of[0] = layer.v(0, c);
    of[1] = *layer.root(in, n, layer.group_of[c]) * layer.weight(n, c);
  };
  auto take = [&](int64_t n, int64_t c, const double* totals) {
    for (int k = 0; k < 3; ++k) sums[k * in.planes() + n * in.channels + c] = static_cast<C>(totals[k]);
  };
  auto finish = [&](int64_t n, int64_t group, C* of) {
    const double r = *layer.root(in, n, group);
    double weighted = 0;
    for (int64_t c = group * of_group; c < (group + 1) * of_group; ++c)
      weighted += static_cast<double>(sums[n * in.channels + c]) * layer.weight(n, c);
    of[0] = *layer.mean(n, group);
    of[1] = static_cast<C>(weighted * r * r * r / static_cast<double>(size));
  };
  // Between the passes dx holds the direct part, if it can without a rounding.
  auto room = [&](int64_t elements) {
    return std::unique_ptr<C[]>(std::is_same_v<S, C> ? nullptr : new C[elements]);
  };
  auto direct = [&](const std::unique_ptr<C[]>& own, int64_t offset) {
    if constexpr (std::is_same_v<S, C>)
      return dx + offset;
    else
      return own.get();
  };
  if (in.channels_last) {
    for_samples(in, [&](int64_t n) {
      const int64_t offset = n * in.sample();
      const auto own = room(in.sample());
      C* const between = direct(own, offset);
      in_sample<S>(in, SSums<S, Linear>{grad + offset, x + offset, between}, [&](int64_t c, C* of) { fill(n, c, of); },
                   [&](int64_t c, const double* totals) { take(n, c, totals); });
      std::vector<C> of_groups(2 * layer.groups);
      for (int64_t group = 0; group < layer.groups; ++group) finish(n, group, &of_groups[2 * group]);
      in_sample<S>(in, SFinish<S>{between, x + offset, dx + offset},
                   [&](int64_t c, C* of) { std::copy_n(&of_groups[2 * layer.group_of[c]], 2, of); }, ignore);
    });
  } else {
    parallel(in.samples * layer.groups, size, [&](int64_t slab) {
      const int64_t n = slab / layer.groups, group = slab % layer.groups, offset = slab * size;
      const auto own = room(size);
      C *const between = direct(own, offset), of[2];
      const SSums<S, Linear> step{grad + offset, x + offset, between};
      for (int64_t c = 0; c < of_group; ++c) {
        double totals[3] = {};
        fill(n, group * of_group + c, of);
        along(step, of, c * in.length, in.length, totals);
        take(n, group * of_group + c, totals);
      }
      finish(n, group, of);
      const SFinish<S> last{between, x + offset, dx + offset};
      for (int64_t c = 0; c < of_group; ++c) along(last, of, c * in.length, in.length, nullptr);
    });
  }
}

struct SGradients {
  Tensor dx, dv, dweight, dbias;
};

// dv, dweight and dbias from the sums over every sample's channel, sample by sample.
template <class C>
void s_parameter_gradients(const Shape& in, const SLayer<C>& layer, const C* sums, const SGradients& to) {
  const int64_t planes = in.planes();
  const bool of_samples = to.dweight.dim() == 2;
  std::vector<double> totals(3 * in.channels);
  C *dv = output<C>(to.dv), *dweight = output<C>(to.dweight), *dbias = output<C>(to.dbias);
  for (int64_t n = 0; n < in.samples; ++n)
    for (int64_t c = 0; c < in.channels; ++c) {
      const int64_t at = n * in.channels + c;
      const double r = *layer.root(in, n, layer.group_of[c]), by_weight = sums[at] * r, by_bias = sums[planes + at];
      totals[c] += sums[2 * planes + at] * r * layer.weight(n, c);
      totals[in.channels + c] += by_weight;
      totals[2 * in.channels + c] += by_bias;
      if (of_samples) dweight[at] = static_cast<C>(by_weight), dbias[at] = static_cast<C>(by_bias);
    }
  for (int64_t c = 0; c < in.channels; ++c) {
    dv[c] = static_cast<C>(totals[c]);
    if (of_samples) continue;
    dweight[c] = static_cast<C>(totals[in.channels + c]);
    dbias[c] = static_cast<C>(totals[2 * in.channels + c]);
  }
}

// Calls body with std::true_type or std::false_type.
template <class Body>
void for_bool(bool value, Body&& body) {
  value ? body(std::true_type{}) : body(std::false_type{});
}

std::tuple<Tensor, Tensor> evonorm_s(const Tensor& x, const Optional& v, const Optional& weight, const Optional& bias,
                                     int64_t groups, double eps, bool rms, bool linear, bool channels_last) {
  const Shape in = shape_of(x, channels_last);
  STD_TORCH_CHECK(groups >= 1 && in.channels % groups == 0, "groups must divide the ", in.channels,
                  " channels of x, got ", groups);
  Tensor y = torch::stable::empty_like(x), stats = new_compute(x, {2, in.samples, groups});
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    const SLayer<compute_t<S>> layer(in, v, weight, bias, stats, eps);
    if (x.numel() == 0) return fill_with(std::numeric_limits<compute_t<S>>::quiet_NaN(), {stats});
    for_bool(linear, [&](auto is_linear) { s_forward<S, is_linear()>(in, layer, input<S>(x), output<S>(y), rms); });
  });
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> evonorm_s_backward(const Tensor& grad, const Tensor& x, const Optional& v,
                                                              const Optional& weight, const Tensor& stats, double eps,
                                                              bool, bool linear, bool channels_last) {
  const Shape in = shape_of(x, channels_last);
  check_like(grad, x, "grad");
  STD_TORCH_CHECK(stats.dim() == 3 && stats.size(2) >= 1 && in.channels % stats.size(2) == 0,
                  "stats must be [2, N, groups], with groups that divide the ", in.channels, " channels of x");
  check_numbers(stats, x, "stats", {2, in.samples, stats.size(2)});
  const bool of_samples = weight.has_value() && weight->dim() == 2;
  auto like_weight = [&] {
    return of_samples ? new_compute(x, {in.samples, in.channels}) : new_compute(x, {in.channels});
  };
  const SGradients to{torch::stable::empty_like(x), new_compute(x, {in.channels}), like_weight(), like_weight()};
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    const SLayer<C> layer(in, v, weight, std::nullopt, stats, eps);
    if (x.numel() == 0) return fill_with(C(0), {to.dv, to.dweight, to.dbias});
    std::vector<C> sums(3 * in.planes());
    for_bool(linear, [&](auto is_linear) {
      s_backward<S, is_linear()>(in, layer, input<S>(grad), input<S>(x), output<S>(to.dx), sums.data());
    });
    s_parameter_gradients(in, layer, sums.data(), to);
  });
  return {to.dx, to.dv, to.dweight, to.dbias};
}

// B layers

Tensor evonorm_moments(const Tensor& x, bool channels_last) {
  const Shape in = shape_of(x, channels_last);
  Tensor moments = new_compute(x, {2, in.samples, in.channels});
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    if (x.numel() == 0) return fill_with(std::numeric_limits<C>::quiet_NaN(), {moments});
    C* const to = output<C>(moments);
    auto put = [&](int64_t plane, const Moments& of) {
      to[plane] = static_cast<C>(of.mean);
      to[in.planes() + plane] = static_cast<C>(of.variance());
    };
    if (in.channels_last) {
      for_samples(in, [&](int64_t n) {
        const std::vector<Moments> of = moments_across(in, input<S>(x) + n * in.sample(), false);
        for (int64_t c = 0; c < in.channels; ++c) put(n * in.channels + c, of[c]);
      });
    } else {
      parallel(in.planes(), in.length, [&](int64_t plane) {
        put(plane, moments_along(input<S>(x) + plane * in.length, in.length, false));
      });
    }
  });
  return moments;
}

template <class C>
struct BLayer {
  Parameter<C> v, weight, bias;
  const C *means, *variances, *left;
  C eps;
  int64_t variant, channels;

  BLayer(const Shape& in, const Tensor& x, const Optional& v, const Optional& weight, const Optional& bias,
         const Tensor& moments, const Tensor& left, double eps, int64_t variant)
      : v(v, C(1), in, "v", 1),
        weight(weight, C(1), in, "weight"),
        bias(bias, C(0), in, "bias"),
        eps(static_cast<C>(eps)),
        variant(variant),
        channels(in.channels) {
    STD_TORCH_CHECK(variant >= kB0 && variant <= kB2, "variant must be 0, 1 or 2, got ", variant);
    check_numbers(moments, x, "moments", {2, in.samples, in.channels});
    check_numbers(left, x, "left", {in.channels});
    means = input<C>(moments);
    variances = means + in.planes();
    this->left = input<C>(left);
  }

  // a, t and L: the right side of the maximum is a x + t.
  void sides(int64_t n, int64_t c, C* of) const {
    const C mean = means[n * channels + c], variance = variances[n * channels + c];
    const C t = std::sqrt((variant == kB0 ? variance : variance + mean * mean) + eps);
    of[0] = variant == kB0 ? v(0, c) : variant == kB1 ? t : C(-1);
    of[1] = left[c] == left[c] ? t : left[c];  // the maximum is NaN if either side is
    of[2] = left[c];
  }
};

Tensor evonorm_b_apply(const Tensor& x, const Optional& v, const Optional& weight, const Optional& bias,
                       const Tensor& moments, const Tensor& left, double eps, int64_t variant, bool channels_last) {
  const Shape in = shape_of(x, channels_last);
  Tensor y = torch::stable::empty_like(x);
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    const BLayer<C> layer(in, x, v, weight, bias, moments, left, eps, variant);
    if (x.numel() == 0) return;
    everywhere<S>(
        in, [&](int64_t offset) { return BApply<S>{input<S>(x) + offset, output<S>(y) + offset}; },
        [&](int64_t n, int64_t c, C* of) {
          layer.sides(n, c, of);
          of[3] = layer.weight(n, c);
          of[4] = layer.bias(n, c);
        },
        ignore);
  });
  return y;
}

Tensor evonorm_b_sums(const Tensor& grad, const Tensor& x, const Optional& v, const Optional& weight,
                      const Tensor& moments, const Tensor& left, double eps, int64_t variant, bool channels_last) {
  const Shape in = shape_of(x, channels_last);
  check_like(grad, x, "grad");
  Tensor sums = new_compute(x, {5, in.samples, in.channels});
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    const BLayer<C> layer(in, x, v, weight, std::nullopt, moments, left, eps, variant);
    if (x.numel() == 0) return fill_with(C(0), {sums});
    C* const to = output<C>(sums);
    everywhere<S>(
        in, [&](int64_t offset) { return BSums<S>{input<S>(grad) + offset, input<S>(x) + offset}; },
        [&](int64_t n, int64_t c, C* of) { layer.sides(n, c, of); },
        [&](int64_t n, int64_t c, const double* totals) {
          const double scale = -static_cast<double>(layer.weight(n, c));
          const double to_right = variant == kB1 ? totals[0] + totals[2] : totals[0];
          const double of[5] = {scale * to_right, scale * totals[1], scale * totals[2], totals[3], totals[4]};
          for (int k = 0; k < 5; ++k) to[k * in.planes() + n * in.channels + c] = static_cast<C>(of[k]);
        });
  });
  return sums;
}

Tensor evonorm_b_grad(const Tensor& grad, const Tensor& x, const Optional& v, const Optional& weight,
                      const Tensor& moments, const Tensor& left, const Tensor& centre, const Tensor& pull,
                      const Tensor& batch_pull, double eps, int64_t variant, bool channels_last) {
  const Shape in = shape_of(x, channels_last);
  check_like(grad, x, "grad");
  check_numbers(centre, x, "centre", {in.channels});
  check_numbers(pull, x, "pull", {in.samples, in.channels});
  check_numbers(batch_pull, x, "batch_pull", {in.channels});
  Tensor dx = torch::stable::empty_like(x);
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    const BLayer<C> layer(in, x, v, weight, std::nullopt, moments, left, eps, variant);
    if (x.numel() == 0) return;
    everywhere<S>(
        in,
        [&](int64_t offset) {
          return BGrad<S>{input<S>(grad) + offset, input<S>(x) + offset, output<S>(dx) + offset};
        },
        [&](int64_t n, int64_t c, C* of) {
          layer.sides(n, c, of);
          of[3] = layer.weight(n, c);
          of[4] = variant == kB0 ? layer.means[n * in.channels + c] : C(0);
          of[5] = input<C>(pull)[n * in.channels + c];
          of[6] = input<C>(centre)[c];
          of[7] = input<C>(batch_pull)[c];
        },
        ignore);
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoo, CPU, m) {
  m.impl("evonorm_s", TORCH_BOX(&evonorm_s));
  m.impl("evonorm_s_backward", TORCH_BOX(&evonorm_s_backward));
  m.impl("evonorm_moments", TORCH_BOX(&evonorm_moments));
  m.impl("evonorm_b_apply", TORCH_BOX(&evonorm_b_apply));
  m.impl("evonorm_b_sums", TORCH_BOX(&evonorm_b_sums));
  m.impl("evonorm_b_grad", TORCH_BOX(&evonorm_b_grad));
}
