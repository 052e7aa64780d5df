// Comp-sum losses and their gradients for one storage type (ZOO_SCALAR): classes last (lanes of a warp, or a block, share
// a row), or positions last (a thread a position, so that neighbours read neighbouring scores).
//
// Bytes moved for n scores of e bytes, and the time for [8192, 32000] in bfloat16 at the 2.84 TB/s an H100 reads and
// writes in elementwise kernels; float32 takes twice as long:
//
//   forward    z        e n    524 MB  0.185 ms
//   backward   z, dz   2e n   1049 MB  0.369 ms
//
// and three numbers of the compute type, one target and one score a row. Every sum has a fixed order.
#include "comp_sum/passes.cuh"

using S = ZOO_SCALAR;
using C = zoo::compute_t<S>;
using zoo::int64;

namespace {

using namespace zoo;
using namespace zoo::comp_sum;

constexpr int kThreads = 256;
constexpr int kBlockThreads = 512;  // most of a block that has one row
constexpr int kTile = 32;           // positions side by side

// 2^k neighbours of a warp that share a row, and what Block has for theirs. All 32 lanes must take part.
struct Lanes {
  int rank, size;

  __device__ explicit Lanes(int size) : rank(threadIdx.x % size), size(size) {}
  __device__ int64 row() const { return static_cast<int64>(blockIdx.x) * (kThreads / size) + threadIdx.x / size; }
  __device__ C max(C value) const {
    for (int step = size / 2; step > 0; step /= 2) {
      const C other = __shfl_xor_sync(kFullWarp, value, step);
      value = other > value ? other : value;
    }
    return value;
  }
  __device__ void sum(C (&values)[1]) const {
    for (int step = size / 2; step > 0; step /= 2) values[0] += __shfl_xor_sync(kFullWarp, values[0], step);
  }
};

// A row as whole 16-byte packs, and the elements before and after them: a row may begin and end inside of a pack. As
// packs of their own (Row of rows.cuh) these edges would be in the loop over packs, once for each load it unrolls.
struct Cut {
  int head, packs, edges;       // elements before the packs; packs; elements before and after
  int pack_of_target, element;  // of a target among the edges: a pack after the last, or a negative element

  ZOO_HD Cut(int64 start, int classes, int target) {
    const int phase = static_cast<int>(start % pack_size<S>);
    head = phase == 0 ? 0 : pack_size<S> - phase;  // also beyond the end of a short row, which then has no packs
    packs = (classes - head) / pack_size<S>;
    edges = classes - packs * pack_size<S>;
    pack_of_target = (target - head) / pack_size<S>;
    element = (target - head) % pack_size<S>;
  }
  ZOO_HD int column(int edge) const { return edge < head ? edge : edge + packs * pack_size<S>; }
};

template <class Team>
__device__ __forceinline__ void forward(const Problem<S>& in, Team& team, int64 row, C* loss, C* statistics) {
  const Label label = in.label(row);
  Running<C> running;
  C mine = 0;
  if (label.valid) {
    const S* scores = in.scores + row * in.classes;
    const Cut cut(row * in.classes, in.classes, label.column);
    if (team.rank == 0) mine = widen(scores[label.column]);
    for (int e = team.rank; e < cut.edges; e += team.size) {
      const C value[1] = {widen(scores[cut.column(e)])};
      if (cut.column(e) != label.column) running.add(value);
    }
    const uint4* packs = reinterpret_cast<const uint4*>(scores + cut.head);
    for (int j = team.rank; j < cut.packs; j += kDeep * team.size) {
      Pack<S> loaded[kDeep];
#pragma unroll
      for (int k = 0; k < kDeep; ++k)
        if (j + k * team.size < cut.packs) loaded[k].raw = packs[j + k * team.size];
#pragma unroll
      for (int k = 0; k < kDeep; ++k) {
        if (j + k * team.size < cut.packs) {
          const bool has_target = j + k * team.size == cut.pack_of_target;
          C values[pack_size<S>];
#pragma unroll
          for (int i = 0; i < pack_size<S>; ++i)
            values[i] = has_target && i == cut.element ? minus_infinity<C>() : C(widen(loaded[k].values[i]));
          running.add(values);
        }
      }
    }
  }
  const C top = team.max(running.top);
  C total[1] = {running.total_at(top)};
  team.sum(total);
  if (team.rank == 0 && row < in.rows) write_row(in, row, label, top, total[0], mine, loss, statistics);
}

// The packs [first, stop) of a row; its edges go with the first ones.
template <class Team>
__device__ __forceinline__ void backward(const Problem<S>& in, const Team& team, int64 row, int first, int stop,
                                         const C* grad, const C* statistics, S* dscores) {
  if (row >= in.rows) return;
  const Label label = in.label(row);
  const S* scores = in.scores + row * in.classes;
  S* to = dscores + row * in.classes;
  const C mine = label.valid ? C(widen(scores[label.column])) : not_a_number<C>();
  const Slopes<C> slopes(in, row, label, grad, statistics, mine);
  const Cut cut(row * in.classes, in.classes, label.column);
  for (int e = team.rank; first == 0 && e < cut.edges; e += team.size) {
    const int column = cut.column(e);
    to[column] = narrow(slopes.at(column, label.column, slopes.silent ? C(0) : C(widen(scores[column]))), S{});
  }
  const uint4* packs = reinterpret_cast<const uint4*>(scores + cut.head);
  uint4* results = reinterpret_cast<uint4*>(to + cut.head);
  if (stop > cut.packs) stop = cut.packs;
  if (slopes.silent) {
    for (int j = first + team.rank; j < stop; j += team.size) store_16_bytes(results + j, Pack<S>().raw);
    return;
  }
  for (int j = first + team.rank; j < stop; j += kDeep * team.size) {
    Pack<S> held[kDeep];
#pragma unroll
    for (int k = 0; k < kDeep; ++k)
      if (j + k * team.size < stop) held[k].raw = packs[j + k * team.size];
#pragma unroll
    for (int k = 0; k < kDeep; ++k) {
      if (j + k * team.size < stop) {
        const bool has_target = j + k * team.size == cut.pack_of_target;
#pragma unroll
        for (int i = 0; i < pack_size<S>; ++i) {
          const C value = slopes.of(widen(held[k].values[i]));
          held[k].values[i] = narrow(has_target && i == cut.element ? slopes.at_target : value, S{});
        }
        store_16_bytes(results + (j + k * team.size), held[k].raw);
      }
    }
  }
}

// A thread's position of [samples, classes, inner], and which classes it looks at: warps of a block that have the same
// positions share the classes.
struct Position {
  int64 row, first;  // where the scores of class 0 are
  int group, groups, tile;

  __device__ Position(const Problem<S>& in, int64 inner, int groups) : groups(groups) {
    const int warp = threadIdx.x / kTile;
    group = warp % groups;
    tile = warp / groups;
    row = (static_cast<int64>(blockIdx.x) * (kThreads / kTile / groups) + tile) * kTile + threadIdx.x % kTile;
    first = row / inner * in.classes * inner + row % inner;
  }
};

}  // namespace

#define ZOO_PROBLEM                                                                                                   \
  const S *scores, const int64 *target, const C *taus, C a, C cap, int64 ignore_index, int64 rows, int classes
#define ZOO_PROBLEM_GIVEN                                            \
  Problem<S> {                                                       \
    scores, target, taus, a, cap, ignore_index, rows, classes        \
  }

extern "C" __global__ void __launch_bounds__(kThreads)
    comp_sum_fwd_lanes(ZOO_PROBLEM, int lanes, C* loss, C* statistics) {
  Lanes team(lanes);
  forward(ZOO_PROBLEM_GIVEN, team, team.row(), loss, statistics);
}
ZOO_EXPORT(comp_sum_fwd_lanes)

extern "C" __global__ void __launch_bounds__(kBlockThreads) comp_sum_fwd_block(ZOO_PROBLEM, C* loss, C* statistics) {
  using Buffers = SumBuffers<C, 1>;
  ZOO_SHARED(Buffers, buffers, 1);
  Block<C, 1> team(buffers[0]);
  forward(ZOO_PROBLEM_GIVEN, team, team.first_row, loss, statistics);
}
ZOO_EXPORT(comp_sum_fwd_block)

extern "C" __global__ void __launch_bounds__(kThreads)
    comp_sum_bwd_lanes(const C* grad, ZOO_PROBLEM, const C* statistics, int lanes, S* dscores) {
  const Lanes team(lanes);  // one part: there are fewer packs than classes
  backward(ZOO_PROBLEM_GIVEN, team, team.row(), 0, classes, grad, statistics, dscores);
}
ZOO_EXPORT(comp_sum_bwd_lanes)

// A row is cut into parts of `segment` packs, one a block.
extern "C" __global__ void __launch_bounds__(kBlockThreads)
    comp_sum_bwd_block(const C* grad, ZOO_PROBLEM, const C* statistics, int parts, int segment, S* dscores) {
  const struct {
    int rank, size;
  } team{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  const int first = static_cast<int>(blockIdx.x % parts) * segment;
  backward(ZOO_PROBLEM_GIVEN, team, blockIdx.x / parts, first, first + segment, grad, statistics, dscores);
}
ZOO_EXPORT(comp_sum_bwd_block)

extern "C" __global__ void __launch_bounds__(kThreads)
    comp_sum_fwd_planes(ZOO_PROBLEM, int64 inner, int groups, C* loss, C* statistics) {
  ZOO_SHARED(C, tops, kThreads);
  ZOO_SHARED(C, totals, kThreads);
  const Problem<S> in = ZOO_PROBLEM_GIVEN;
  const Position position(in, inner, groups);
  const Label label = in.label(position.row);
  Running<C> running;
  const int stop = label.valid ? classes : 0;
  for (int c = position.group; c < stop; c += kDeep * groups) {
    C values[kDeep];
#pragma unroll
    for (int k = 0; k < kDeep; ++k) {
      const int at = c + k * groups;
      values[k] = at < stop && at != label.column ? C(widen(scores[position.first + at * inner])) : minus_infinity<C>();
    }
    running.add(values);
  }
  tops[threadIdx.x] = running.top;
  totals[threadIdx.x] = running.total;
  __syncthreads();
  if (position.group > 0 || position.row >= rows) return;
  for (int k = 1; k < groups; ++k) running.merge({tops[threadIdx.x + k * kTile], totals[threadIdx.x + k * kTile]});
  const C mine = label.valid ? C(widen(scores[position.first + label.column * inner])) : C(0);
  write_row(in, position.row, label, running.top, running.total, mine, loss, statistics);
}
ZOO_EXPORT(comp_sum_fwd_planes)

extern "C" __global__ void __launch_bounds__(kThreads)
    comp_sum_bwd_planes(const C* grad, ZOO_PROBLEM, const C* statistics, int64 inner, int groups, S* dscores) {
  const Problem<S> in = ZOO_PROBLEM_GIVEN;
  const Position position(in, inner, groups);
  if (position.row >= rows) return;
  const Label label = in.label(position.row);
  const C mine = label.valid ? C(widen(scores[position.first + label.column * inner])) : not_a_number<C>();
  const Slopes<C> slopes(in, position.row, label, grad, statistics, mine);
  for (int c = position.group; c < classes; c += kDeep * groups) {
    C values[kDeep];
#pragma unroll
    for (int k = 0; k < kDeep; ++k) {
      const int at = c + k * groups;
      values[k] = at < classes && !slopes.silent ? C(widen(scores[position.first + at * inner])) : C(0);
    }
#pragma unroll
    for (int k = 0; k < kDeep; ++k) {
      const int at = c + k * groups;
      if (at < classes) dscores[position.first + at * inner] = narrow(slopes.at(at, label.column, values[k]), S{});
    }
  }
}
ZOO_EXPORT(comp_sum_bwd_planes)
