// zoo::comp_sum and zoo::comp_sum_backward for CPU tensors. Schemas: comp_sum/ops.py; what they promise:
// comp_sum/eager.py.
#include <algorithm>
#include <tuple>

#include "common/stable.h"
#include "comp_sum/cpu_kernels.h"

namespace {

using namespace zoo;
using namespace zoo::comp_sum;
using namespace zoo::stable;

constexpr int64_t kElementsPerTask = 32768;  // below this a second thread costs more than it does

using Optional = std::optional<Tensor>;

// The same numbers, one row after the other: what belongs to rows is often expanded, and small beside the scores.
Tensor of_rows(const Tensor& t, ScalarType type, const Tensor& scores, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == scores.size(0) && t.size(1) == scores.size(2) && t.scalar_type() == type,
                  name, " must be [B, S] with the samples and positions of the scores [B, C, S], and ",
                  type == ScalarType::Long ? "int64" : "of the compute dtype");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Scores and targets, checked: a class out of range would be read from somewhere else.
struct Rows {
  const Tensor& scores;
  Tensor target;
  Optional taus;
  int64_t samples, classes, length, ignore_index;

  Rows(const Tensor& scores, const Tensor& target, const Optional& taus, int64_t ignore_index)
      : scores(scores), ignore_index(ignore_index) {
    STD_TORCH_CHECK(scores.dim() == 3 && scores.size(1) > 0, "scores must be [B, C, S] with C >= 1, got ", scores.dim(),
                    " axes", scores.dim() == 3 ? " and no class" : "");
    check_contiguous(scores, "scores");
    samples = scores.size(0), classes = scores.size(1), length = scores.size(2);
    this->target = of_rows(target, ScalarType::Long, scores, "target");
    if (taus.has_value()) this->taus = of_rows(*taus, compute_scalar_type(scores), scores, "taus");
    const int64_t* y = input<int64_t>(this->target);
    for (int64_t row = 0; row < count(); ++row)
      STD_TORCH_CHECK((y[row] >= 0 && y[row] < classes) || y[row] == ignore_index, "target[", row / length, ", ",
                      row % length, "] is ", y[row], ", but there are ", classes, " classes; give classes in [0, ",
                      classes, "), or ignore_index, ", ignore_index);
  }

  int64_t count() const { return samples * length; }

  template <class C>
  Loss<C> loss(double tau, double cap) const {
    return {classes,
            ignore_index,
            input<int64_t>(target),
            taus.has_value() ? input<C>(*taus) : nullptr,
            static_cast<C>(1 - tau),
            static_cast<C>(cap)};
  }

  // Calls along(first row, count) for at most kRows rows of classes, or across(block, its first row, offset of its
  // sample) for every block.
  template <class S, class Along, class Across>
  void each(Along&& along, Across&& across) const {
    if (scores.numel() == 0) return;
    if (length == 1) {
      // Blocks of a size that follows from the shape: what lies beside a row is the same for any number of threads.
      const int64_t rows = std::clamp<int64_t>(kElementsPerTask / classes, 1, kRows);
      parallel((samples + rows - 1) / rows, classes * rows, [&](int64_t block) {
        along(block * rows, std::min(rows, samples - block * rows));
      });
      return;
    }
    const int64_t blocks = (length + kRows - 1) / kRows;
    parallel(samples * blocks, classes * std::min(kRows, length), [&](int64_t task) {
      const int64_t sample = task / blocks, first = task % blocks * kRows, offset = sample * classes * length;
      const Block<S> block{input<S>(scores) + offset, classes, length, first, std::min(kRows, length - first)};
      across(block, sample * length + first, offset);
    });
  }

 private:
  template <class Body>
  static void parallel(int64_t count, int64_t elements, Body&& body) {
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, kElementsPerTask / elements),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) body(i);
                                });
  }
};

std::tuple<Tensor, Tensor> comp_sum_forward(const Tensor& scores, const Tensor& target, const Optional& taus,
                                            double tau, double cap, int64_t ignore_index) {
  const Rows rows(scores, target, taus, ignore_index);
  Tensor loss = new_compute(scores, {rows.samples, rows.length});
  Tensor statistics = new_compute(scores, {2, rows.samples, rows.length});
  for_dtype(scores, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    const Loss<C> in = rows.loss<C>(tau, cap);
    C* const top = output<C>(statistics);
    const Statistics<C> to{output<C>(loss), top, top + rows.count()};
    rows.each<S>([&](int64_t first, int64_t count) { forward_rows(in, to, input<S>(scores), first, count); },
                 [&](const Block<S>& block, int64_t row, int64_t) { forward_block(in, to, block, row); });
  });
  return {loss, statistics};
}

Tensor comp_sum_backward(const Tensor& grad, const Tensor& scores, const Tensor& target, const Tensor& statistics,
                         const Optional& taus, double tau, double cap, int64_t ignore_index) {
  const Rows rows(scores, target, taus, ignore_index);
  const Tensor of_loss = of_rows(grad, compute_scalar_type(scores), scores, "grad");
  check_contiguous(statistics, "statistics");
  STD_TORCH_CHECK(statistics.dim() == 3 && statistics.size(0) == 2 && statistics.size(1) == rows.samples &&
                      statistics.size(2) == rows.length && statistics.scalar_type() == compute_scalar_type(scores),
                  "statistics must be [2, B, S] as the forward left them");
  Tensor gradient = torch::stable::empty_like(scores);
  for_dtype(scores, [&](auto s) {
    using S = decltype(s);
    using C = compute_t<S>;
    const Loss<C> in = rows.loss<C>(tau, cap);
    const C *g = input<C>(of_loss), *numbers = input<C>(statistics);
    S* const to = output<S>(gradient);
    rows.each<S>([&](int64_t first, int64_t count) {
                   backward_rows(in, g, numbers, rows.count(), input<S>(scores), to, first, count);
                 },
                 [&](const Block<S>& block, int64_t row, int64_t offset) {
                   backward_block(in, g, numbers, rows.count(), block, to + offset, row);
                 });
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zoo, CPU, m) {
  m.impl("comp_sum", TORCH_BOX(&comp_sum_forward));
  m.impl("comp_sum_backward", TORCH_BOX(&comp_sum_backward));
}
