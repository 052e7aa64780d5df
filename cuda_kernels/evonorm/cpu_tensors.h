// Tensors of the EvoNorm layers on the CPU: what is asked of them, and how the work on them is divided.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "common/stable.h"
#include "evonorm/cpu_kernels.h"

namespace zoo::evonorm {

using stable::check_contiguous;
using stable::compute_scalar_type;
using stable::dtype_of;
using stable::new_compute;
using stable::output;
using stable::Tensor;

using Optional = std::optional<Tensor>;

template <class C>
void fill_with(C value, std::initializer_list<Tensor> tensors) {
  for (const Tensor& t : tensors) std::fill_n(output<C>(t), t.numel(), value);
}

struct Shape {
  int64_t samples, channels, length;
  bool channels_last;

  int64_t sample() const { return channels * length; }
  int64_t planes() const { return samples * channels; }
};

inline Shape shape_of(const Tensor& x, bool channels_last) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [N, C, L], or [N, L, C] with channels_last, got ", x.dim(), " axes");
  check_contiguous(x, "x");
  // A map of one pixel lies the same way in both layouts, and vectors fill with channels only.
  return {x.size(0), x.size(channels_last ? 2 : 1), x.size(channels_last ? 1 : 2),
          channels_last || (x.size(2) == 1 && x.size(1) > 1)};
}

inline void check_like(const Tensor& t, const Tensor& x, const char* name) {
  check_contiguous(t, name);
  bool alike = t.dim() == x.dim() && t.scalar_type() == x.scalar_type();
  for (int64_t k = 0; alike && k < x.dim(); ++k) alike = t.size(k) == x.size(k);
  STD_TORCH_CHECK(alike, name, " must be shaped and typed like x");
}

// A tensor of the compute dtype with these sizes.
inline void check_numbers(const Tensor& t, const Tensor& x, const char* name, std::initializer_list<int64_t> size) {
  check_contiguous(t, name);
  bool fits = t.dim() == static_cast<int64_t>(size.size()) && t.scalar_type() == compute_scalar_type(x);
  int64_t k = 0;
  for (const int64_t n : size) fits = fits && t.size(k++) == n;
  STD_TORCH_CHECK(fits, name, " must hold numbers of the compute dtype for every sample, channel or group of x");
}

// A parameter, or its default where there is none: one number a channel, or one a sample and channel.
template <class C>
struct Parameter {
  std::vector<C> values;
  int64_t by_sample = 0, by_channel = 0;

  Parameter(const Optional& t, C otherwise, const Shape& in, const char* name, int64_t most_axes = 2)
      : values(1, otherwise) {
    if (!t.has_value()) return;
    check_contiguous(*t, name);
    const int64_t axes = t->dim();
    const bool of_samples = axes == 2;
    STD_TORCH_CHECK(axes >= 1 && axes <= most_axes && t->size(-1) == in.channels &&
                        (!of_samples || t->size(0) == in.samples),
                    name, " must be [C]", most_axes == 2 ? " or [N, C]" : "", " with the ", in.channels,
                    " channels and ", in.samples, " samples of x");
    const Dtype dtype = dtype_of(*t);
    values.resize(t->numel());
    for (size_t i = 0; i < values.size(); ++i) values[i] = read_as<C>(t->const_data_ptr(), dtype, i);
    by_sample = of_samples ? in.channels : 0;
    by_channel = 1;
  }
  C operator()(int64_t n, int64_t c) const { return values[n * by_sample + c * by_channel]; }
};

// How the work is divided

constexpr int64_t kElementsPerTask = Rows::task_elements;  // below this a second thread costs more than it does

template <class Body>
void parallel(int64_t count, int64_t elements, Body&& body) {
  if (count == 0) return;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) body(i);
                              });
}

// Channels-last samples: side by side where they are enough for all threads, else one after the other with all threads
// on the tasks of each. Both come to the same sums.
template <class Body>
void for_samples(const Shape& in, Body&& body) {
  if (in.sample() <= kElementsPerTask || in.samples >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel(in.samples, in.sample(), body);
  } else {
    for (int64_t n = 0; n < in.samples; ++n) body(n);
  }
}

// The step in one channels-last sample: fill(c, of) writes the parameters of a channel, take(c, totals) gets its sums.
template <class S, class Step, class Fill, class Take>
void in_sample(const Shape& in, const Step& step, Fill&& fill, Take&& take) {
  using C = compute_t<S>;
  const Rows rows(in.length, in.channels, Vector<C>::lanes);
  std::vector<C> tables(std::max(1, Step::tables) * rows.padded), sums(rows.tasks * Step::sums * rows.padded);
  for (int64_t c = 0; c < in.channels; ++c) {
    C of[std::max(1, Step::tables)];
    fill(c, of);
    for (int k = 0; k < Step::tables; ++k)
      for (int64_t p = 0; p < rows.pixels; ++p)
        tables[k * rows.padded + cpu::place<S>(p * in.channels + c)] = of[k];
  }
  auto run = [&](int64_t task) {
    across(step, rows, tables.data(), sums.data() + task * Step::sums * rows.padded, task);
  };
  if (rows.tasks == 1)
    run(0);
  else
    parallel(rows.tasks, rows.task_rows * rows.width, run);
  if constexpr (Step::sums > 0) {
    std::vector<double> totals(Step::sums * rows.padded);
    for (int64_t task = 0; task < rows.tasks; ++task)
      for (size_t i = 0; i < totals.size(); ++i) totals[i] += sums[task * totals.size() + i];
    for (int64_t c = 0; c < in.channels; ++c) {
      double of[Step::sums] = {};
      for (int k = 0; k < Step::sums; ++k)
        for (int64_t p = 0; p < rows.pixels; ++p) of[k] += totals[k * rows.padded + cpu::place<S>(p * in.channels + c)];
      take(c, of);
    }
  }
}

// The step everywhere: at(offset) is the step of what begins there, fill and take as above with the sample before c.
template <class S, class At, class Fill, class Take>
void everywhere(const Shape& in, At&& at, Fill&& fill, Take&& take) {
  using C = compute_t<S>;
  using Step = decltype(at(int64_t{}));
  if (in.channels_last) {
    for_samples(in, [&](int64_t n) {
      in_sample<S>(in, at(n * in.sample()), [&](int64_t c, C* of) { fill(n, c, of); },
                   [&](int64_t c, const double* totals) { take(n, c, totals); });
    });
  } else {
    parallel(in.planes(), in.length, [&](int64_t plane) {
      const int64_t n = plane / in.channels, c = plane % in.channels;
      C of[Step::tables];
      double totals[std::max(1, Step::sums)] = {};
      fill(n, c, of);
      along(at(plane * in.length), of, 0, in.length, totals);
      take(n, c, totals);
    });
  }
}

// The moments of every channel of a channels-last sample; with `rms` mean 0 and the sums of squares.
template <class S>
std::vector<Moments> moments_across(const Shape& in, const S* x, bool rms) {
  using C = compute_t<S>;
  std::vector<Moments> moments(in.channels);
  if (in.length == 1) {
    for (int64_t c = 0; c < in.channels; ++c) {
      const double t = widen(x[c]);
      moments[c] = rms ? Moments{1, 0, t * t} : Moments{1, t, t - t};  // a NaN stays
    }
    return moments;
  }
  std::vector<C> means(in.channels);
  if (!rms) centres(x, in.length, in.channels, means.data());
  const double count = static_cast<double>(in.length);
  in_sample<S>(in, Centred<S>{x}, [&](int64_t c, C* of) { *of = means[c]; },
               [&](int64_t c, const double* totals) { moments[c] = Moments::of(rms, means[c], count, totals); });
  return moments;
}

}  // namespace zoo::evonorm
