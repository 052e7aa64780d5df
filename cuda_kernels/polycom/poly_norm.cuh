// PolyNorm and its gated form on a GPU: one team of threads a row, in three widths.
//
//   <op>_warp   a warp a row, the row in registers
//   <op>_block  a block a row, the row in registers
//   <op>_loop   a block a row, the row read twice: what fits waits in shared memory, the rest is in L2
//
// Bytes moved for [rows, width] of e bytes an element, and the time they take at 2.84 TB/s (two tensors) and 2.94 TB/s
// (three and more), which elementwise kernels reach on an H100; [4096, 16384] bfloat16:
//
//   forward          x, y               2e   268 MB  0.094 ms
//   backward         x, g, dx           3e   403 MB  0.137 ms
//   gated forward    x, m, o            3e   403 MB  0.137 ms
//   gated backward   x, m, g, dx, dm    5e   671 MB  0.228 ms
//
// and order + 1 numbers of the compute type a row. The target is 80 % of the measured copy bandwidth.
#pragma once

#include "common/rows.cuh"
#include "polycom/math.h"

namespace zoo::polycom {

// What all four kernels are told.
template <class S>
struct Problem {
  using C = compute_t<S>;
  const S *x, *mul;     // [rows, width]; mul null: not gated
  const void* weight;   // [order], or [rows, order]
  const void* bias;     // [1], [rows, 1] or null
  const void* scores;   // [rows] or null
  int weight_dtype, bias_dtype, scores_dtype;
  bool weight_per_row, bias_per_row;
  C* stats;             // [order + 1, rows]: rho of each power, 1 / scale
  int64 rows;
  int width, staged;
  C count, eps, threshold, clamp;  // count divides the sums; clamp 0: none
};

template <int N, class S>
struct Coefficients {
  using C = compute_t<S>;
  C weight[N], constant, score;

  ZOO_HD Coefficients(const Problem<S>& in, int64 row) {
    for (int k = 0; k < N; ++k) weight[k] = read_as<C>(in.weight, in.weight_dtype, (in.weight_per_row ? row * N : 0) + k);
    constant = in.bias ? read_as<C>(in.bias, in.bias_dtype, in.bias_per_row ? row : 0) : C(0);
    score = in.scores ? read_as<C>(in.scores, in.scores_dtype, row) : C(1);
  }
};

// Only the gated form has a clamp. Without one the plain forward has 30 % fewer instructions, the backward 25 % (blocks,
// sm_90, bfloat16).
template <bool Gated, class C>
ZOO_HD C clamped(C value, C bound) {
  if (!Gated || !(bound > 0)) return value;
  return value > bound ? bound : value < -bound ? -bound : value;
}
// The gradient stops beyond the clamp.
template <bool Gated, class C>
ZOO_HD C masked(C gradient, C argument, C bound) {
  return Gated && bound > 0 && !((argument < 0 ? -argument : argument) <= bound) ? C(0) : gradient;
}

// 1 / scale of a row whose power sums may have left the range; sums are taken again where it is not 1.
template <int N, int Packs, bool Gated, class S, class C, class Team>
__device__ C rescale(const Problem<S>& in, Team& team, const Held<S, Packs>& held, int packs, C (&sums)[N]) {
  C largest = 0;
  each_pack<Packs>(team, packs, [&](int k, int j) {
    const Pack<S> pack = held.again(k, j);
    for (int i = 0; i < pack_size<S>; ++i) {
      const C value = clamped<Gated>(widen(pack.values[i]), in.clamp), size = value < 0 ? -value : value;
      largest = size > largest ? size : largest;
    }
  });
  const C inverse = inverse_scale(team.max(largest), in.threshold);
  if (inverse == 1) return inverse;
  for (int k = 0; k < N; ++k) sums[k] = 0;
  each_pack<Packs>(team, packs, [&](int k, int j) {
    const Pack<S> pack = held.again(k, j);
    for (int i = 0; i < pack_size<S>; ++i)
      add_power_sums<N>(clamped<Gated>(widen(pack.values[i]), in.clamp) * inverse, sums, N);
  });
  team.sum(sums);
  return inverse;
}

template <int N, int Packs, bool Gated, template <class, int> class TeamOf, class S>
__device__ __forceinline__ void forward(const Problem<S>& in, S* out) {
  using C = compute_t<S>;
  using Buffers = SumBuffers<C, N>;
  ZOO_SHARED(Buffers, buffers, 1);
  ZOO_DYNAMIC_SHARED(uint4, shared);
  TeamOf<C, N> team(buffers[0]);
  for (int64 row = team.first_row; row < in.rows; row += team.row_step) {
    const Row<const S> x(in.x, row, in.width);
    const Held<S, Packs> held(team, x, shared, in.staged);
    C sums[N] = {}, rho[N];
    each_pack<Packs>(team, x.count, [&](int k, int j) {
      const Pack<S> pack = held.first(k, j);
      // Beyond the row's ends a pack holds zeros: they add nothing.
      for (int i = 0; i < pack_size<S>; ++i) add_power_sums<N>(clamped<Gated>(widen(pack.values[i]), in.clamp), sums, N);
    });
    team.sum(sums);
    C inverse = 1;
    // The same in every thread of the team, who hold the same sums.
    if (!is_ordinary(sums[0]) && sums[0] == sums[0]) inverse = rescale<N, Packs, Gated>(in, team, held, x.count, sums);
    inverse_norms<N>(sums, rho, inverse, in.count, in.eps, N);
    const Coefficients<N, S> given(in, row);
    C k_rho[N];
    for (int k = 0; k < N; ++k) k_rho[k] = given.weight[k] * rho[k];
    const Row<S> to(out, row, in.width);
    each_pack<Packs>(team, x.count, [&](int k, int j) {
      const Pack<S> pack = held.again(k, j);
      Pack<S> mul, result;
      if constexpr (Gated) mul = load_pack<S>(Row<const S>(in.mul, row, in.width), j);
      for (int i = 0; i < pack_size<S>; ++i) {
        const C t = clamped<Gated>(widen(pack.values[i]), in.clamp) * inverse;
        C y = polynomial<N>(t, k_rho, given.constant, N);
        if constexpr (Gated) y = y * clamped<Gated>(widen(mul.values[i]), in.clamp) * given.score;
        result.values[i] = narrow(y, S{});
      }
      store_pack(to, j, result);
    });
    if (team.rank == 0) {
      for (int k = 0; k < N; ++k) in.stats[k * in.rows + row] = rho[k];
      in.stats[N * in.rows + row] = inverse;
    }
  }
}

// Where the gradients go. Sums over rows are left as one summand a block, [order + 1, blocks]; with one set of
// coefficients a row there is nothing to sum, and they go to dweight and dbias.
template <class S>
struct Gradients {
  using C = compute_t<S>;
  S *dx, *dmul;
  C *partial, *dweight, *dbias, *dscores;
};

// A few blocks a multiprocessor loop over the rows: few summands, and always the same ones in the same order.
template <int N, int Packs, bool Gated, template <class, int> class TeamOf, class S>
__device__ __forceinline__ void backward(const Problem<S>& in, const S* grad, const Gradients<S>& to) {
  using C = compute_t<S>;
  constexpr int Sums = Gated ? N + 2 : N + 1;
  using Buffers = SumBuffers<C, Sums>;
  ZOO_SHARED(Buffers, buffers, 1);
  ZOO_DYNAMIC_SHARED(uint4, shared);
  TeamOf<C, Sums> team(buffers[0]);
  C totals[N + 1] = {};
  for (int64 row = team.first_row; row < in.rows; row += team.row_step) {
    const Row<const S> x(in.x, row, in.width), g(grad, row, in.width), m(Gated ? in.mul : in.x, row, in.width);
    const Held<S, Packs> held_x(team, x, shared, in.staged), held_g(team, g, shared + in.staged, in.staged);
    const Held<S, Gated ? Packs : 0> held_m(team, m, shared + 2 * in.staged, Gated ? in.staged : 0);
    const Coefficients<N, S> given(in, row);
    C rho[N], k_rho[N], sums[Sums] = {};
    for (int k = 0; k < N; ++k) {
      rho[k] = in.stats[k * in.rows + row];
      k_rho[k] = given.weight[k] * rho[k];
    }
    const C inverse = in.stats[N * in.rows + row];
    each_pack<Packs>(team, x.count, [&](int k, int j) {
      const Pack<S> pack = held_x.first(k, j), incoming = held_g.first(k, j);
      Pack<S> mul, dmul;
      if constexpr (Gated) mul = held_m.first(k, j);
      for (int i = 0; i < pack_size<S>; ++i) {
        const C t = clamped<Gated>(widen(pack.values[i]), in.clamp) * inverse;
        C from_above = widen(incoming.values[i]);
        if constexpr (Gated) {
          const C raw = widen(mul.values[i]), bounded = clamped<Gated>(raw, in.clamp);
          const C with_y = from_above * polynomial<N>(t, k_rho, given.constant, N);
          sums[N + 1] += with_y * bounded;
          dmul.values[i] = narrow(masked<Gated>(with_y * given.score, raw, in.clamp), S{});
          from_above = from_above * bounded * given.score;
        }
        add_moments<N>(t, from_above, sums, N);
      }
      if constexpr (Gated) store_pack(Row<S>(to.dmul, row, in.width), j, dmul);
    });
    team.sum(sums);
    const RowGradient<N, C> terms = row_gradient<N>(given.weight, rho, sums, in.count, N);
    const Row<S> dx(to.dx, row, in.width);
    each_pack<Packs>(team, x.count, [&](int k, int j) {
      const Pack<S> pack = held_x.again(k, j), incoming = held_g.again(k, j);
      Pack<S> mul, result;
      if constexpr (Gated) mul = held_m.again(k, j);
      for (int i = 0; i < pack_size<S>; ++i) {
        const C raw = widen(pack.values[i]), t = clamped<Gated>(raw, in.clamp) * inverse;
        C from_above = widen(incoming.values[i]);
        if constexpr (Gated) from_above = from_above * clamped<Gated>(widen(mul.values[i]), in.clamp) * given.score;
        result.values[i] = narrow(masked<Gated>(element_gradient<N>(t, from_above, terms, N) * inverse, raw, in.clamp), S{});
      }
      store_pack(dx, j, result);
    });
    if (in.weight_per_row) {
      if (team.rank == 0) {
        for (int k = 0; k < N; ++k) to.dweight[row * N + k] = sums[k];
        to.dbias[row] = sums[N];
      }
    } else {
      for (int k = 0; k <= N; ++k) totals[k] += sums[k];
    }
    if constexpr (Gated)
      if (team.rank == 0) to.dscores[row] = sums[N + 1];
  }
  if (in.weight_per_row) return;  // the same for the whole grid
  team.sum_of_block(totals);
  if (threadIdx.x == 0)
    for (int k = 0; k <= N; ++k) to.partial[k * static_cast<int64>(gridDim.x) + blockIdx.x] = totals[k];
}

}  // namespace zoo::polycom
