// Fibers: functions that stop in the middle and go on later, each on a stack of its own. They know nothing of
// CUDA.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define ZOO_EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ZOO_EMU_ASAN 1
#endif
#endif

#ifdef ZOO_EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
// The C library's _longjmp under a name of ours: with _FORTIFY_SOURCE the usual name is bound to a variant
// that aborts on any jump to a higher address of another stack, which is what every second switch is.
extern "C" [[noreturn]] void zoo_emu_longjmp(struct __jmp_buf_tag*, int) __asm__("_longjmp");
#endif

namespace zoo::emu {

// Kernels keep register arrays, and without optimisation every temporary lives in memory as well; the
// sanitizer puts red zones around each variable. Pages that no thread touches cost nothing. The odd number of
// cache lines keeps the tops of the stacks from falling into the same few sets of the cache.
#ifdef ZOO_EMU_ASAN
constexpr std::size_t stack_bytes = 256 * 1024 + 17 * 64;
#else
constexpr std::size_t stack_bytes = 128 * 1024 + 17 * 64;
#endif

class Fiber {
 public:
  // Runs `task` once for each time it is resumed after the task has ended: making a context is a system call,
  // so one fiber serves many CUDA threads. `stack` holds stack_bytes.
  Fiber(unsigned char* stack, void (*task)()) : stack_(stack), task_(task) {
#ifdef ZOO_EMU_ASAN
    __asan_unpoison_memory_region(stack_, stack_bytes);  // red zones of a fiber that was abandoned here
#endif
    std::fill_n(reinterpret_cast<std::uint64_t*>(stack_), canary_words, canary);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From the host: lets the task run until it suspends or ends.
  void resume() {
#ifdef ZOO_EMU_ASAN
    if (!started_) make_context(context_);
    __sanitizer_start_switch_fiber(&host_fake_stack_, stack_, stack_bytes);
    swapcontext(&host_, &context_);
    __sanitizer_finish_switch_fiber(host_fake_stack_, nullptr, nullptr);
#else
    if (_setjmp(host_) != 0) return;
    if (started_) zoo_emu_longjmp(context_, 1);
    ucontext_t fresh;
    make_context(fresh);
    setcontext(&fresh);
#endif
  }

  // From the task: back to the host, until the next resume.
  void suspend() {
#ifdef ZOO_EMU_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, host_stack_, host_stack_bytes_);
    swapcontext(&context_, &host_);
    __sanitizer_finish_switch_fiber(fake_stack_, &host_stack_, &host_stack_bytes_);
#else
    if (_setjmp(context_) == 0) zoo_emu_longjmp(host_, 1);
#endif
  }

  // False once the task has written past the low end of its stack.
  bool stack_intact() const {
    const auto* words = reinterpret_cast<const std::uint64_t*>(stack_);
    return std::all_of(words, words + canary_words, [](std::uint64_t word) { return word == canary; });
  }

 private:
  static constexpr std::size_t canary_words = 8;
  static constexpr std::uint64_t canary = 0x5afe57ac5afe57acu;

  void make_context(ucontext_t& context) {
    started_ = true;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_;
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = nullptr;  // enter() never returns
    entering() = this;
    makecontext(&context, &Fiber::enter, 0);
  }

  static void enter() {
    Fiber& self = *entering();
#ifdef ZOO_EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &self.host_stack_, &self.host_stack_bytes_);
#endif
    for (;;) {
      self.task_();
      self.suspend();
    }
  }

  // makecontext passes ints only; the new fiber finds itself here.
  static Fiber*& entering() {
    static thread_local Fiber* fiber = nullptr;
    return fiber;
  }

  unsigned char* stack_;
  void (*task_)();
  bool started_ = false;
#ifdef ZOO_EMU_ASAN
  ucontext_t context_, host_;
  void* fake_stack_ = nullptr;
  void* host_fake_stack_ = nullptr;
  const void* host_stack_ = nullptr;
  std::size_t host_stack_bytes_ = 0;
#else
  jmp_buf context_, host_;
#endif
};

// The fibers of one host thread. The last one given back is the next one taken, so threads that end without
// waiting all run on the same warm stack.
class FiberPool {
 public:
  FiberPool(std::size_t capacity, void (*task)()) : capacity_(capacity), task_(task) {}

  Fiber& take() {
    if (idle_.empty()) idle_.push_back(&add());
    Fiber* fiber = idle_.back();
    idle_.pop_back();
    return *fiber;
  }

  void give(Fiber& fiber) { idle_.push_back(&fiber); }

  // Drops every fiber, also those that stopped in the middle of a kernel that failed.
  void clear() {
    idle_.clear();
    fibers_.clear();
  }

 private:
  Fiber& add() {
    // One stack more than fibers: what the lowest fiber writes past its end is still ours, and the report can
    // be made.
    if (!stacks_) stacks_.reset(new unsigned char[(capacity_ + 1) * stack_bytes]);
    fibers_.push_back(std::make_unique<Fiber>(stacks_.get() + (fibers_.size() + 1) * stack_bytes, task_));
    return *fibers_.back();
  }

  std::size_t capacity_;
  void (*task_)();
  std::unique_ptr<unsigned char[]> stacks_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
};

}  // namespace zoo::emu
