// A launch: from the arguments of the C entry to every block of the grid, and the report on the way back.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "block.h"

namespace zoo::emu {

// Where the running thread's block lies.
struct Grid {
  Index3 shape, block_shape, block_index;
};
inline thread_local Grid grid{};

inline std::string text(Index3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// Throws if a GPU would refuse the launch.
inline void check_shapes(Index3 blocks, Index3 threads, int schedule) {
  const auto all = [](bool good, const std::string& message) {
    if (!good) throw std::runtime_error(message);
  };
  const std::uint64_t size = std::uint64_t{threads.x} * threads.y * threads.z;
  all(blocks.x && blocks.y && blocks.z, "the grid " + text(blocks) + " is empty");
  all(threads.x && threads.y && threads.z, "the block " + text(threads) + " is empty");
  all(threads.x <= max_block_threads && threads.y <= max_block_threads && size <= max_block_threads,
      "the block " + text(threads) + " has more than " + std::to_string(max_block_threads) + " threads");
  all(threads.z <= 64, "the block " + text(threads) + " is deeper than 64");
  all(blocks.x <= 0x7fffffffu && blocks.y <= 0xffffu && blocks.z <= 0xffffu,
      "the grid " + text(blocks) + " is larger than (2147483647, 65535, 65535)");
  all(schedule >= 0 && schedule <= 2, "schedule " + std::to_string(schedule) + " is not 0, 1 or 2");
}

// Blocks run one after the other; their order follows the schedule too, since no kernel may depend on it.
template <class Visit>
void for_each_block(Index3 shape, Schedule schedule, unsigned seed, const Visit& visit) {
  const std::uint64_t count = std::uint64_t{shape.x} * shape.y * shape.z;
  std::vector<std::uint64_t> order;
  if (schedule == Schedule::shuffled) {
    order.resize(count);
    std::iota(order.begin(), order.end(), std::uint64_t{0});
    std::shuffle(order.begin(), order.end(), std::minstd_rand(seed));
  }
  for (std::uint64_t i = 0; i < count; ++i) {
    std::uint64_t rank = i;
    if (schedule == Schedule::descending) rank = count - 1 - i;
    if (schedule == Schedule::shuffled) rank = order[i];
    const std::uint64_t row = rank / shape.x;
    visit(Index3{static_cast<unsigned>(rank % shape.x), static_cast<unsigned>(row % shape.y),
                 static_cast<unsigned>(row / shape.y)});
  }
}

inline void run_grid(Index3 blocks, Index3 threads, std::size_t shared_bytes, int schedule, unsigned seed,
                     std::function<void()> body) {
  check_shapes(blocks, threads, schedule);
  static thread_local Block block;  // its stacks serve all launches of this host thread
  block.begin_launch(threads, shared_bytes, static_cast<Schedule>(schedule), seed, std::move(body));
  grid = {blocks, threads, {}};
  for_each_block(blocks, static_cast<Schedule>(schedule), seed, [&](Index3 index) {
    grid.block_index = index;
    try {
      block.run();
    } catch (const std::exception& error) {
      block.abandon();
      throw std::runtime_error("block " + text(index) + ": " + error.what());
    }
  });
}

template <class... A, std::size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  (void)arguments;
  kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
}

// The body of zoo_emu_<kernel>: nullptr, or a report that lives until this host thread's next launch.
template <class... A>
const char* launch(const char* name, void (*kernel)(A...), const unsigned* blocks, const unsigned* threads,
                   std::size_t shared_bytes, void** arguments, int schedule, unsigned seed) noexcept {
  static thread_local std::string report;
  try {
    run_grid({blocks[0], blocks[1], blocks[2]}, {threads[0], threads[1], threads[2]}, shared_bytes, schedule,
             seed, [=] { call(kernel, arguments, std::index_sequence_for<A...>{}); });
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "out of memory";
  } catch (const std::exception& error) {
    report = std::string("kernel '") + name + "', " + error.what();
    return report.c_str();
  }
}

// The body of zoo_emu_params_<kernel>: how many parameters, and the size of each as far as there is room.
template <class... A>
int parameter_sizes(void (*)(A...), int* sizes, int capacity) noexcept {
  constexpr int count = sizeof...(A);
  const int all[] = {static_cast<int>(sizeof(A))..., 0};
  std::copy_n(all, std::min(count, capacity), sizes);
  return count;
}

// The names of a library's kernels, so that a misspelt one can be answered with those that exist.
inline std::vector<const char*>& exported_kernels() {
  static std::vector<const char*> names;
  return names;
}
struct Exported {
  explicit Exported(const char* name) { exported_kernels().push_back(name); }
};

}  // namespace zoo::emu

extern "C" __attribute__((weak, visibility("default"))) const char* zoo_emu_kernel_name(std::size_t index) {
  const auto& names = zoo::emu::exported_kernels();
  return index < names.size() ? names[index] : nullptr;
}

#define ZOO_EXPORT(kernel)                                                                                   \
  static const ::zoo::emu::Exported zoo_emu_exported_##kernel{#kernel};                                      \
  extern "C" __attribute__((visibility("default"))) const char* zoo_emu_##kernel(                            \
      const unsigned* grid3, const unsigned* block3, std::size_t dynamic_shared_bytes, void** arguments,     \
      int schedule, unsigned seed) {                                                                         \
    return ::zoo::emu::launch(#kernel, kernel, grid3, block3, dynamic_shared_bytes, arguments, schedule, seed);\
  }                                                                                                          \
  extern "C" __attribute__((visibility("default"))) int zoo_emu_params_##kernel(int* sizes, int capacity) {  \
    return ::zoo::emu::parameter_sizes(kernel, sizes, capacity);                                             \
  }
