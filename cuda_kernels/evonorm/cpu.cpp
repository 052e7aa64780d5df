// The ops of the EvoNorm layers for CPU tensors. Schemas: zoo/norms/evonorm/ops.py; what they promise: eager.py beside it.
#include <algorithm>
#include <optional>
#include <tuple>

#include "common/stable.h"
#include "evonorm/cpu_kernels.h"

namespace {

using namespace zoo;
using namespace zoo::evonorm;
using namespace zoo::stable;

constexpr int64_t kElementsPerTask = 32768;  // below this a second thread costs more than it does

Tensor new_compute(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()), compute_scalar_type(like));
}

Extents extents_of(const Tensor& x, bool channels_last) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [N, C, L], or [N, L, C] with channels_last, got ", x.dim(), " dimensions");
  check_contiguous(x, "x");
  return {x.size(0), x.size(channels_last ? 2 : 1), x.size(channels_last ? 1 : 2)};
}

void check_like(const Tensor& t, const Tensor& x, const char* name) {
  check_contiguous(t, name);
  bool same = t.dim() == x.dim() && t.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, name, " must be shaped and typed like x");
}

void check_compute(const Tensor& t, const Tensor& x, int64_t size, const char* name) {
  check_contiguous(t, name);
  STD_TORCH_CHECK(t.scalar_type() == compute_scalar_type(x) && t.numel() == size, name, " must hold ", size,
                  " numbers of the compute type, got ", t.numel());
}

// A parameter in the compute type; `absent` where there is none.
template <class C>
Parameter<C> parameter(const std::optional<Tensor>& given, const Extents& extents, C absent, const char* name) {
  Parameter<C> found;
  if (!given.has_value()) {
    found.values.assign(extents.channels, absent);
    return found;
  }
  check_contiguous(*given, name);
  found.per_sample = given->dim() == 2;
  const int64_t size = (found.per_sample ? extents.samples : 1) * extents.channels;
  STD_TORCH_CHECK(given->numel() == size, name, " must hold ", size, " numbers, got ", given->numel());
  found.values.resize(size);
  for (int64_t i = 0; i < size; ++i) found.values[i] = read_as<C>(given->const_data_ptr(), dtype_of(*given), i);
  return found;
}

bool is_per_sample(const std::optional<Tensor>& weight) { return weight.has_value() && weight->dim() == 2; }

// Calls body(begin, end) on shares of [0, count), each of which stands for `elements` elements.
template <class Body>
void parallel(int64_t count, int64_t elements, Body&& body) {
  if (count == 0 || elements == 0) return;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kElementsPerTask / elements), body);
}

// Calls body(sample, block, first, last) for the blocks of positions of every sample.
template <class Body>
void for_each_block(const Extents& extents, Body&& body) {
  const Blocks blocks(extents);
  parallel(extents.samples * blocks.count, std::min(blocks.positions, extents.length) * extents.channels,
           [&](int64_t begin, int64_t end) {
             for (int64_t k = begin; k < end; ++k) {
               const int64_t first = k % blocks.count * blocks.positions;
               body(k / blocks.count, k, first, std::min(first + blocks.positions, extents.length));
             }
           });
}

// [quantities, N, C] from the blocks' [N blocks, quantities, C], in the order of the blocks.
template <class C>
void add_blocks(const Extents& extents, int quantities, const std::vector<C>& partial, C* sums) {
  const Blocks blocks(extents);
  const int64_t channels = extents.channels;
  std::vector<double> total(channels);
  for (int64_t n = 0; n < extents.samples; ++n) {
    for (int k = 0; k < quantities; ++k) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t b = 0; b < blocks.count; ++b) {
        const C* from = partial.data() + ((n * blocks.count + b) * quantities + k) * channels;
        for (int64_t c = 0; c < channels; ++c) total[c] += from[c];
      }
      C* to = sums + (k * extents.samples + n) * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<C>(total[c]);
    }
  }
}

template <class S, class Layer>
void sums(const Layer& layer, const S* grad, const S* x, bool channels_last, compute_t<S>* to) {
  using C = compute_t<S>;
  const Extents& extents = layer.extents;
  if (!channels_last) {
    parallel(extents.samples * extents.channels, extents.length,
             [&](int64_t begin, int64_t end) { sums_planes(layer, grad, x, to, begin, end); });
    return;
  }
  const int64_t width = Layer::quantities * extents.channels;
  std::vector<C> partial(extents.samples * Blocks(extents).count * width);
  for_each_block(extents, [&](int64_t n, int64_t k, int64_t first, int64_t last) {
    sums_pixels(layer, grad, x, partial.data() + k * width, n, first, last);
  });
  add_blocks(extents, Layer::quantities, partial, to);
}

template <class S, class Layer>
void apply(const Layer& layer, const S* x, bool channels_last, S* y) {
  const Extents& extents = layer.extents;
  if (!channels_last) {
    parallel(extents.samples * extents.channels, extents.length,
             [&](int64_t begin, int64_t end) { apply_planes(layer, x, y, begin, end); });
  } else {
    for_each_block(extents, [&](int64_t n, int64_t, int64_t first, int64_t last) { apply_pixels(layer, x, y, n, first, last); });
  }
}

template <class S, class Layer>
void gradient(const Layer& layer, const S* grad, const S* x, bool channels_last, S* dx) {
  const Extents& extents = layer.extents;
  if (!channels_last) {
    parallel(extents.samples * extents.channels, extents.length,
             [&](int64_t begin, int64_t end) { gradient_planes(layer, grad, x, dx, begin, end); });
  } else {
    for_each_block(extents, [&](int64_t n, int64_t, int64_t first, int64_t last) {
      gradient_pixels(layer, grad, x, dx, n, first, last);
    });
  }
}

// Mean and biased variance of each plane, [2, N, C].
template <class S>
void moments_into(const Extents& extents, const S* x, bool channels_last, compute_t<S>* to) {
  using C = compute_t<S>;
  if (!channels_last) {
    parallel(extents.samples * extents.channels, extents.length,
             [&](int64_t begin, int64_t end) { moments_planes(extents, x, to, begin, end); });
    return;
  }
  const Blocks blocks(extents);
  const int64_t channels = extents.channels, width = 2 * channels, planes = extents.samples * channels;
  std::vector<C> partial(extents.samples * blocks.count * width);
  for_each_block(extents, [&](int64_t n, int64_t k, int64_t first, int64_t last) {
    moments_pixels(extents, x, partial.data() + k * width, n, first, last);
  });
  for (int64_t n = 0; n < extents.samples; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      double count = 0, mean = 0, squares = 0;
      for (int64_t b = 0; b < blocks.count; ++b) {
        const C* from = partial.data() + (n * blocks.count + b) * width;
        const double size = static_cast<double>(std::min(blocks.positions, extents.length - b * blocks.positions));
        const double away = from[c] - mean, share = size / (count + size);
        squares += from[channels + c] + away * away * count * share;
        mean += away * share;
        count += size;
      }
      to[n * channels + c] = static_cast<C>(mean);
      to[planes + n * channels + c] = static_cast<C>(std::max(0.0, squares / count));
    }
  }
}

// Those of groups of channels, in the form of stats [2, N, G].
template <class C>
void stats_of_groups(const Extents& extents, int64_t members, const C* moments, C eps, bool rms, C* stats) {
  const int64_t groups = extents.channels / members, planes = extents.samples * extents.channels;
  for (int64_t k = 0; k < extents.samples * groups; ++k) {
    double mean = 0, variance = 0;
    for (int64_t m = 0; m < members; ++m) mean += moments[k * members + m];
    mean /= static_cast<double>(members);
    for (int64_t m = 0; m < members; ++m) {
      const double away = moments[k * members + m] - mean;
      variance += moments[planes + k * members + m] + away * away;
    }
    variance /= static_cast<double>(members);
    if (rms) variance += mean * mean;
    stats[k] = rms ? C(0) : static_cast<C>(mean);
    stats[extents.samples * groups + k] = static_cast<C>(1 / std::sqrt(variance + static_cast<double>(eps)));
  }
}

int64_t members_of(const Extents& extents, int64_t groups) {
  STD_TORCH_CHECK(groups > 0 && extents.channels % groups == 0, "groups must divide the ", extents.channels,
                  " channels of x, got ", groups);
  return extents.channels / groups;
}

std::tuple<Tensor, Tensor> evonorm_s(const Tensor& x, const std::optional<Tensor>& v, const std::optional<Tensor>& weight,
                                     const std::optional<Tensor>& bias, int64_t groups, double eps, bool rms, bool linear,
                                     bool channels_last) {
  const Extents extents = extents_of(x, channels_last);
  const int64_t members = members_of(extents, groups);
  Tensor y = torch::stable::empty_like(x), stats = new_compute(x, {2, extents.samples, groups});
  if (x.numel() == 0) return {y, torch::stable::fill_(stats, 0.0)};
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    const LayerS<C> layer{extents, members, parameter<C>(v, extents, 1, "v"), parameter<C>(weight, extents, 1, "weight"),
                          parameter<C>(bias, extents, 0, "bias"), output<C>(stats), nullptr, linear};
    if (!channels_last) {
      parallel(extents.samples * groups, members * extents.length, [&](int64_t begin, int64_t end) {
        s_forward_slabs<S>(layer, input<S>(x), output<S>(y), output<C>(stats), static_cast<C>(eps), rms, begin, end);
      });
      return;
    }
    std::vector<C> moments(2 * extents.samples * extents.channels);
    moments_into(extents, input<S>(x), true, moments.data());
    stats_of_groups(extents, members, moments.data(), static_cast<C>(eps), rms, output<C>(stats));
    apply(layer, input<S>(x), true, output<S>(y));
  });
  return {y, stats};
}

// [N, C] as the gradient of a parameter: as it is, or summed over the samples in their order.
template <class C>
void reduce_samples(const Extents& extents, const std::vector<double>& of_planes, bool per_sample, C* to) {
  for (int64_t c = 0; c < (per_sample ? extents.samples : 1) * extents.channels; ++c) {
    double sum = of_planes.empty() ? 0 : of_planes[c];
    if (!per_sample)
      for (int64_t n = 1; n < extents.samples; ++n) sum += of_planes[n * extents.channels + c];
    to[c] = static_cast<C>(sum);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> evonorm_s_backward(const Tensor& grad, const Tensor& x,
                                                              const std::optional<Tensor>& v,
                                                              const std::optional<Tensor>& weight, const Tensor& stats,
                                                              double eps, bool rms, bool linear, bool channels_last) {
  const Extents extents = extents_of(x, channels_last);
  check_like(grad, x, "grad");
  STD_TORCH_CHECK(stats.dim() == 3, "stats must be [2, N, G], got ", stats.dim(), " dimensions");
  const int64_t groups = stats.size(2), members = members_of(extents, groups);
  check_compute(stats, x, 2 * extents.samples * groups, "stats");
  const bool per_sample = is_per_sample(weight);
  const int64_t rows = per_sample ? extents.samples : 1;
  Tensor dx = torch::stable::empty_like(x), dv = new_compute(x, {extents.channels});
  Tensor dweight = per_sample ? new_compute(x, {rows, extents.channels}) : new_compute(x, {extents.channels});
  Tensor dbias = per_sample ? new_compute(x, {rows, extents.channels}) : new_compute(x, {extents.channels});
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    const int64_t planes = extents.samples * extents.channels;
    std::vector<C> found(3 * planes), pull;
    LayerS<C> layer{extents, members, parameter<C>(v, extents, 1, "v"), parameter<C>(weight, extents, 1, "weight"),
                    parameter<C>(std::nullopt, extents, 0, "bias"), input<C>(stats), nullptr, linear};
    if (x.numel() == 0) {
      // nothing was added to anything
    } else if (!channels_last) {
      parallel(extents.samples * groups, members * extents.length, [&](int64_t begin, int64_t end) {
        s_backward_slabs<S>(layer, input<S>(grad), input<S>(x), output<S>(dx), found.data(), begin, end);
      });
    } else {
      sums(layer, input<S>(grad), input<S>(x), true, found.data());
      pull.resize(extents.samples * groups);
      for (int64_t k = 0; k < extents.samples * groups; ++k) {
        double through = 0;
        for (int64_t p = k * members; p < (k + 1) * members; ++p) {
          const C* gamma = layer.gamma.of(p / extents.channels, extents.channels);
          through += static_cast<double>(gamma[p % extents.channels]) * found[p];
        }
        const double r = input<C>(stats)[extents.samples * groups + k];
        pull[k] = static_cast<C>(through * r * r * r / static_cast<double>(members * extents.length));
      }
      layer.pull = pull.data();
      gradient(layer, input<S>(grad), input<S>(x), true, output<S>(dx));
    }
    std::vector<double> by_v(planes), by_weight(planes), by_bias(planes);
    for (int64_t p = 0; p < planes; ++p) {
      const double r = input<C>(stats)[extents.samples * groups + p / members];
      const C* gamma = layer.gamma.of(p / extents.channels, extents.channels);
      by_weight[p] = found[p] * r;
      by_bias[p] = found[planes + p];
      by_v[p] = found[2 * planes + p] * r * gamma[p % extents.channels];
    }
    reduce_samples(extents, by_v, false, output<C>(dv));
    reduce_samples(extents, by_weight, per_sample, output<C>(dweight));
    reduce_samples(extents, by_bias, per_sample, output<C>(dbias));
  });
  return {dx, dv, dweight, dbias};
}

Tensor evonorm_moments(const Tensor& x, bool channels_last) {
  const Extents extents = extents_of(x, channels_last);
  Tensor moments = new_compute(x, {2, extents.samples, extents.channels});
  if (x.numel() == 0) return torch::stable::fill_(moments, 0.0);
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    moments_into(extents, input<S>(x), channels_last, output<compute_t<S>>(moments));
  });
  return moments;
}

template <class Body>
void for_variant(int64_t variant, Body&& body) {
  STD_TORCH_CHECK(variant >= 0 && variant <= 2, "variant must be 0, 1 or 2, got ", variant);
  switch (variant) {
    case 0:
      return body(std::integral_constant<int, kB0>{});
    case 1:
      return body(std::integral_constant<int, kB1>{});
    default:
      return body(std::integral_constant<int, kB2>{});
  }
}

// Calls body(storage type, layer) for the B layer of a call.
template <class Body>
void with_layer_b(const Tensor& x, const std::optional<Tensor>& v, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, const Tensor& moments, const Tensor& left, double eps,
                  int64_t variant, bool channels_last, Body&& body) {
  const Extents extents = extents_of(x, channels_last);
  check_compute(moments, x, 2 * extents.samples * extents.channels, "moments");
  check_compute(left, x, extents.channels, "left");
  for_dtype(x, [&](auto s) {
    using C = compute_t<decltype(s)>;
    for_variant(variant, [&](auto which) {
      body(s, LayerB<which(), C>{extents, parameter<C>(v, extents, 1, "v"), parameter<C>(weight, extents, 1, "weight"),
                                 parameter<C>(bias, extents, 0, "bias"), input<C>(moments), input<C>(left),
                                 static_cast<C>(eps), nullptr, nullptr, nullptr});
    });
  });
}

Tensor evonorm_b_apply(const Tensor& x, const std::optional<Tensor>& v, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, const Tensor& moments, const Tensor& left, double eps,
                       int64_t variant, bool channels_last) {
  Tensor y = torch::stable::empty_like(x);
  with_layer_b(x, v, weight, bias, moments, left, eps, variant, channels_last, [&](auto s, const auto& layer) {
    using S = decltype(s);
    if (x.numel() != 0) apply(layer, input<S>(x), channels_last, output<S>(y));
  });
  return y;
}

Tensor evonorm_b_sums(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& v,
                      const std::optional<Tensor>& weight, const Tensor& moments, const Tensor& left, double eps,
                      int64_t variant, bool channels_last) {
  check_like(grad, x, "grad");
  const Extents extents = extents_of(x, channels_last);
  Tensor found = new_compute(x, {5, extents.samples, extents.channels});
  if (x.numel() == 0) return torch::stable::fill_(found, 0.0);
  with_layer_b(x, v, weight, std::nullopt, moments, left, eps, variant, channels_last, [&](auto s, const auto& layer) {
    using S = decltype(s);
    sums(layer, input<S>(grad), input<S>(x), channels_last, output<compute_t<S>>(found));
  });
  return found;
}

Tensor evonorm_b_grad(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& v,
                      const std::optional<Tensor>& weight, const Tensor& moments, const Tensor& left,
                      const Tensor& centre, const Tensor& pull, const Tensor& batch_pull, double eps, int64_t variant,
                      bool channels_last) {
  check_like(grad, x, "grad");
  const Extents extents = extents_of(x, channels_last);
  check_compute(centre, x, extents.channels, "centre");
  check_compute(pull, x, extents.samples * extents.channels, "pull");
  check_compute(batch_pull, x, extents.channels, "batch_pull");
  Tensor dx = torch::stable::empty_like(x);
  with_layer_b(x, v, weight, std::nullopt, moments, left, eps, variant, channels_last, [&](auto s, auto layer) {
    using S = decltype(s);
    using C = compute_t<S>;
    layer.centre = input<C>(centre);
    layer.pull = input<C>(pull);
    layer.batch_pull = input<C>(batch_pull);
    if (x.numel() != 0) gradient(layer, input<S>(grad), input<S>(x), channels_last, output<S>(dx));
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
