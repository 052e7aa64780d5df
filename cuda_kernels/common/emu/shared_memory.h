// The shared memory of one block: poisoned when the block starts, guarded against writes past either end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"  // ZOO_EMU_ASAN

namespace zoo::emu {

class SharedArray {
 public:
  // `key` tells arrays apart that have the same name: the address of a static at the declaration.
  SharedArray(const void* key, std::string label, std::size_t bytes)
      : key_(key),
        label_(std::move(label)),
        bytes_(bytes),
        lines_(2 + (bytes + sizeof(Line) - 1) / sizeof(Line)) {
    poison();
  }
  SharedArray(SharedArray&&) = default;
  ~SharedArray() { set_accessible(true); }

  const void* key() const { return key_; }
  unsigned char* data() { return lines_[1].bytes; }

  // As at the start of a block: nobody has written, and as float or double every element is a NaN.
  void poison() {
    set_accessible(true);
    std::memset(data(), 0xff, bytes_);
    for (unsigned char* byte = lines_.data()->bytes; byte != data(); ++byte) *byte = guard(byte);
    for (unsigned char* byte = data() + bytes_; byte != end(); ++byte) *byte = guard(byte);
    set_accessible(false);
  }

  // What was written outside of the array, as a clause; empty if nothing.
  std::string damage() {
    set_accessible(true);
    std::string found;
    for (unsigned char* byte = lines_.data()->bytes; byte != data() && found.empty(); ++byte)
      if (*byte != guard(byte)) found = describe("before the start", data() - byte);
    for (unsigned char* byte = data() + bytes_; byte != end() && found.empty(); ++byte)
      if (*byte != guard(byte)) found = describe("past the end", byte - (data() + bytes_) + 1);
    set_accessible(false);
    return found;
  }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64];
  };

  // Differs from the poison, so that writing -1 is seen, and still reads as NaN in half, single and double
  // precision.
  static unsigned char guard(const unsigned char* byte) {
    static constexpr unsigned char pattern[4] = {0xfa, 0xfd, 0xfe, 0xff};
    return pattern[reinterpret_cast<std::uintptr_t>(byte) % 4];
  }

  unsigned char* end() { return lines_.data()->bytes + lines_.size() * sizeof(Line); }

  std::string describe(const char* where, std::ptrdiff_t distance) const {
    const std::string unit = distance == 1 ? " byte " : " bytes ";
    return "a thread wrote " + std::to_string(distance) + unit + where + " of " + label_ + " (" +
           std::to_string(bytes_) + " bytes)";
  }

  // The sanitizer reports an access to the guards where it happens, reads included.
  void set_accessible(bool accessible) {
#ifdef ZOO_EMU_ASAN
    if (lines_.empty()) return;  // moved from
    if (accessible) {
      __asan_unpoison_memory_region(lines_.data(), lines_.size() * sizeof(Line));
    } else {
      __asan_poison_memory_region(lines_.data(), sizeof(Line));
      __asan_poison_memory_region(data() + bytes_, end() - (data() + bytes_));
    }
#else
    (void)accessible;
#endif
  }

  const void* key_;
  std::string label_;
  std::size_t bytes_;
  std::vector<Line> lines_;  // one of guard, the array, at least one of guard
};

class SharedMemory {
 public:
  void begin_launch(std::size_t dynamic_bytes) {
    arrays_.clear();
    arrays_.emplace_back(nullptr, "the dynamic shared memory", dynamic_bytes);
  }

  void begin_block() {
    for (SharedArray& array : arrays_) array.poison();
  }

  unsigned char* dynamic() { return arrays_.front().data(); }

  // The same memory for every thread of the block that passes this declaration.
  unsigned char* fixed(const void* key, const char* name, std::size_t bytes) {
    for (SharedArray& array : arrays_)
      if (array.key() == key) return array.data();
    arrays_.emplace_back(key, std::string("the shared array '") + name + "'", bytes);
    return arrays_.back().data();
  }

  std::string damage() {
    for (SharedArray& array : arrays_)
      if (std::string found = array.damage(); !found.empty()) return found;
    return {};
  }

 private:
  std::vector<SharedArray> arrays_;  // the first is the dynamic one; a moved array keeps its memory
};

}  // namespace zoo::emu
