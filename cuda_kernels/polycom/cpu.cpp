// zoo::poly_relu, zoo::poly_norm, zoo::poly_norm_mul and their backwards for CPU tensors. Schemas: polycom/ops.py;
// what they promise: polycom/eager.py.
#include <algorithm>
#include <tuple>

#include "common/stable.h"
#include "polycom/cpu_kernels.h"

namespace {

using namespace zoo;
using namespace zoo::polycom;
using namespace zoo::stable;

constexpr int64_t kElementsPerTask = 32768;  // below this a second thread costs more than it does
constexpr int64_t kElementsPerBlock = 16384;  // of poly_relu; fixed, so that sums do not depend on the threads

// Calls body with the order as a constant, 0 for those without code of their own.
template <class Body>
void for_order(int64_t order, Body&& body) {
  STD_TORCH_CHECK(order >= 1 && order <= kMostPowers, "order must be in [1, ", kMostPowers, "], got ", order);
  switch (order) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 5:
      return body(std::integral_constant<int, 5>{});
    default:
      return body(std::integral_constant<int, 0>{});
  }
}

template <class Body>
void parallel_rows(int64_t rows, int64_t width, Body&& body) {
  if (rows == 0) return;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kElementsPerTask / width), body);
}

template <class S>
Rows<S> rows_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& stats, double eps,
                bool rms, std::optional<double> clamp) {
  using C = compute_t<S>;
  const int64_t rows = x.size(0), width = x.size(1);
  Rows<S> in{};
  in.rows = rows;
  in.width = width;
  in.coefficients.weight = weight.const_data_ptr();
  in.coefficients.weight_dtype = dtype_of(weight);
  in.coefficients.per_row = weight.dim() == 2;
  in.coefficients.order = static_cast<int>(weight.size(-1));
  if (bias.has_value()) {
    in.coefficients.bias = bias->const_data_ptr();
    in.coefficients.bias_dtype = dtype_of(*bias);
    in.coefficients.bias_per_row = bias->dim() == 2;
  }
  in.stats = output<C>(stats);
  in.count = rms ? static_cast<C>(width) : C(1);
  in.eps = static_cast<C>(eps);
  in.clamp = clamp.has_value() ? static_cast<C>(*clamp) : C(0);
  return in;
}

void check_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "x must be rows [R, D] with D >= 1");
  STD_TORCH_CHECK(weight.dim() == 1 || (weight.dim() == 2 && weight.size(0) == x.size(0)),
                  "weight must be [order] or one set a row");
  check_contiguous(x, "x");
  check_contiguous(weight, "weight");
  if (bias.has_value()) {
    check_contiguous(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == (bias->dim() == 2 ? x.size(0) : 1), "bias must be [1] or one constant a row");
  }
}

void check_like(const Tensor& t, const Tensor& x, const char* name) {
  check_contiguous(t, name);
  STD_TORCH_CHECK(t.numel() == x.numel() && t.scalar_type() == x.scalar_type(), name, " must be shaped and typed like x");
}

// dweight and dbias from moments [order + 1, rows]: row by row where there is one set a row, else their sums.
template <class C>
void parameter_gradients(const Tensor& moments, const Tensor& dweight, const Tensor& dbias) {
  const int64_t order = moments.size(0) - 1, rows = moments.size(1);
  const C* from = input<C>(moments);
  C *to_weight = output<C>(dweight), *to_bias = output<C>(dbias);
  if (dweight.dim() == 2) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < order; ++k) to_weight[row * order + k] = from[k * rows + row];
      to_bias[row] = from[order * rows + row];
    }
    return;
  }
  for (int64_t k = 0; k <= order; ++k) {
    double sum = 0;
    for (int64_t row = 0; row < rows; ++row) sum += from[k * rows + row];
    (k < order ? to_weight[k] : *to_bias) = static_cast<C>(sum);
  }
}

std::tuple<Tensor, Tensor> new_parameter_gradients(const Tensor& x, const Tensor& weight) {
  const int64_t order = weight.size(-1);
  if (weight.dim() == 1) return {new_compute(x, {order}), new_compute(x, {1})};
  return {new_compute(x, {x.size(0), order}), new_compute(x, {x.size(0), 1})};
}

std::optional<Tensor> as_compute(const std::optional<Tensor>& scores, const Tensor& x) {
  if (scores.has_value()) {
    check_contiguous(*scores, "scores");
    STD_TORCH_CHECK(scores->numel() == x.size(0), "scores must hold one factor a row");
  }
  if (!scores.has_value() || scores->scalar_type() == compute_scalar_type(x)) return scores;
  return torch::stable::to(*scores, compute_scalar_type(x));
}

std::tuple<Tensor, Tensor> poly_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                                     bool rms) {
  check_rows(x, weight, bias);
  Tensor y = torch::stable::empty_like(x), stats = new_compute(x, {weight.size(-1) + 1, x.size(0)});
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    const auto in = rows_of<S>(x, weight, bias, stats, eps, rms, std::nullopt);
    for_order(weight.size(-1), [&](auto n) {
      parallel_rows(in.rows, in.width, [&](int64_t begin, int64_t end) {
        poly_norm_rows<n()>(in, input<S>(x), output<S>(y), begin, end);
      });
    });
  });
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> poly_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                      const Tensor& stats, double eps, bool rms) {
  check_rows(x, weight, std::nullopt);
  check_like(grad, x, "grad");
  check_contiguous(stats, "stats");
  Tensor dx = torch::stable::empty_like(x), moments = new_compute(x, {weight.size(-1) + 1, x.size(0)});
  auto [dweight, dbias] = new_parameter_gradients(x, weight);
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    const auto in = rows_of<S>(x, weight, std::nullopt, stats, eps, rms, std::nullopt);
    for_order(weight.size(-1), [&](auto n) {
      parallel_rows(in.rows, in.width, [&](int64_t begin, int64_t end) {
        poly_norm_backward_rows<n()>(in, input<S>(grad), input<S>(x), output<S>(dx), output<C>(moments), begin, end);
      });
    });
    parameter_gradients<C>(moments, dweight, dbias);
  });
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor> poly_norm_mul(const Tensor& x, const Tensor& mul, const Tensor& weight,
                                         const std::optional<Tensor>& bias, const std::optional<Tensor>& scores, double eps,
                                         bool rms, std::optional<double> clamp) {
  check_rows(x, weight, bias);
  check_like(mul, x, "mul");
  Tensor out = torch::stable::empty_like(x), stats = new_compute(x, {weight.size(-1) + 1, x.size(0)});
  const std::optional<Tensor> factors = as_compute(scores, x);
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    const auto in = rows_of<S>(x, weight, bias, stats, eps, rms, clamp);
    const C* score = factors.has_value() ? input<C>(*factors) : nullptr;
    for_order(weight.size(-1), [&](auto n) {
      parallel_rows(in.rows, in.width, [&](int64_t begin, int64_t end) {
        poly_norm_mul_rows<n()>(in, input<S>(x), input<S>(mul), score, output<S>(out), begin, end);
      });
    });
  });
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> poly_norm_mul_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mul, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& scores, const Tensor& stats, double eps, bool rms, std::optional<double> clamp) {
  check_rows(x, weight, bias);
  check_like(mul, x, "mul");
  check_like(grad, x, "grad");
  check_contiguous(stats, "stats");
  Tensor dx = torch::stable::empty_like(x), dmul = torch::stable::empty_like(x);
  Tensor moments = new_compute(x, {weight.size(-1) + 1, x.size(0)}), dscores = new_compute(x, {x.size(0)});
  auto [dweight, dbias] = new_parameter_gradients(x, weight);
  const std::optional<Tensor> factors = as_compute(scores, x);
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    const auto in = rows_of<S>(x, weight, bias, stats, eps, rms, clamp);
    const C* score = factors.has_value() ? input<C>(*factors) : nullptr;
    for_order(weight.size(-1), [&](auto n) {
      parallel_rows(in.rows, in.width, [&](int64_t begin, int64_t end) {
        poly_norm_mul_backward_rows<n()>(in, input<S>(grad), input<S>(x), input<S>(mul), score, output<S>(dx),
                                         output<S>(dmul), output<C>(moments), output<C>(dscores), begin, end);
      });
    });
    parameter_gradients<C>(moments, dweight, dbias);
  });
  return {dx, dmul, dweight, dbias, dscores};
}

template <class C>
std::vector<C> coefficients_of(const Tensor& weight) {
  std::vector<C> values(weight.numel());
  for (size_t k = 0; k < values.size(); ++k) values[k] = read_as<C>(weight.const_data_ptr(), dtype_of(weight), k);
  return values;
}

Tensor poly_relu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_contiguous(x, "x");
  check_contiguous(weight, "weight");
  Tensor y = torch::stable::empty_like(x);
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    const std::vector<C> w = coefficients_of<C>(weight);
    const C constant = bias.has_value() ? read_as<C>(bias->const_data_ptr(), dtype_of(*bias), 0) : C(0);
    for_order(weight.numel(), [&](auto n) {
      parallel_rows(x.numel(), 1, [&](int64_t begin, int64_t end) {
        poly_relu_elements<n()>(w.data(), constant, static_cast<int>(w.size()), input<S>(x), output<S>(y), begin, end);
      });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> poly_relu_backward(const Tensor& grad, const Tensor& x, const Tensor& weight) {
  check_contiguous(x, "x");
  check_contiguous(weight, "weight");
  check_like(grad, x, "grad");
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = new_compute(x, {weight.numel()}), dbias = new_compute(x, {1});
  for_dtype(x, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    std::vector<C> slopes = coefficients_of<C>(weight);
    const int order = static_cast<int>(slopes.size());
    for (int k = 0; k < order; ++k) slopes[k] *= static_cast<C>(order - k);
    const int64_t blocks = (x.numel() + kElementsPerBlock - 1) / kElementsPerBlock;
    std::vector<C> sums(blocks * (order + 1));
    for_order(order, [&](auto n) {
      parallel_rows(blocks, kElementsPerBlock, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * kElementsPerBlock, last = std::min(first + kElementsPerBlock, x.numel());
          poly_relu_backward_elements<n()>(slopes.data(), order, input<S>(grad), input<S>(x), output<S>(dx),
                                           sums.data() + block * (order + 1), first, last);
        }
      });
    });
    for (int k = 0; k <= order; ++k) {
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += sums[block * (order + 1) + k];
      (k < order ? output<C>(dweight)[k] : *output<C>(dbias)) = static_cast<C>(sum);
    }
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoo, CPU, m) {
  m.impl("poly_relu", TORCH_BOX(&poly_relu));
  m.impl("poly_relu_backward", TORCH_BOX(&poly_relu_backward));
  m.impl("poly_norm", TORCH_BOX(&poly_norm));
  m.impl("poly_norm_backward", TORCH_BOX(&poly_norm_backward));
  m.impl("poly_norm_mul", TORCH_BOX(&poly_norm_mul));
  m.impl("poly_norm_mul_backward", TORCH_BOX(&poly_norm_mul_backward));
}
