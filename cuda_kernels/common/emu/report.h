// The words of the emulator's reports: collectives, places in the source, ranges of threads.
#pragma once

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace zoo::emu {

enum class Collective {
  sync_threads,
  sync_threads_count,
  sync_threads_and,
  sync_threads_or,
  sync_warp,  // the first that concerns one warp
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  ballot,  // the first vote
  any,
  all,
};

inline bool is_warp_collective(Collective what) { return what >= Collective::sync_warp; }
inline bool is_vote(Collective what) { return what >= Collective::ballot; }

inline std::string name_of(Collective what) {
  static constexpr const char* names[] = {
      "__syncthreads",  "__syncthreads_count", "__syncthreads_and", "__syncthreads_or", "__syncwarp", "__shfl_sync",
      "__shfl_up_sync", "__shfl_down_sync",    "__shfl_xor_sync",   "__ballot_sync",    "__any_sync", "__all_sync",
  };
  return names[static_cast<int>(what)];
}

// A line of a kernel's source.
struct Site {
  const char* file;
  int line;

  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

inline std::string where(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

inline std::string hexadecimal(unsigned value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

// "threads 0-15, 17" for ascending numbers and the noun "thread".
inline std::string ranges(const char* noun, const std::vector<unsigned>& numbers) {
  std::string text = noun + std::string(numbers.size() == 1 ? " " : "s ");
  for (std::size_t first = 0, last; first < numbers.size(); first = last + 1) {
    last = first;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    if (first != 0) text += ", ";
    text += std::to_string(numbers[first]);
    if (last != first) text += "-" + std::to_string(numbers[last]);
  }
  return text;
}

}  // namespace zoo::emu
