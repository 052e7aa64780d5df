// One block of threads: which thread runs next, what each collective waits for, and what is wrong when nobody
// can go on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "report.h"
#include "shared_memory.h"

namespace zoo::emu {

constexpr unsigned warp_size = 32;
constexpr unsigned max_block_threads = 1024;
static_assert(max_block_threads == warp_size * 32, "a 32-bit set names every warp of a block");

struct Index3 {
  unsigned x, y, z;
};

// The order in which threads that can run do run. A thread runs until it waits at a collective or ends. A
// correct kernel gives the same result in every order.
enum class Schedule {
  ascending,   // the lowest thread that can run: a warp goes as far as it can before the next one starts
  descending,  // the highest
  shuffled,    // any, drawn anew for every run of a thread
};

// What one lane brings to a collective.
struct Wait {
  Collective what;
  Site site;
  unsigned mask;          // warp collectives: the lanes that take part
  std::uint64_t operand;  // predicate, or the bits of the value
  unsigned source_lane;   // shuffles: whose value this lane gets
};

struct Thread {
  Index3 index;
  unsigned rank;
  Fiber* fiber = nullptr;  // from the first run until the thread ends
  Wait wait{};
  std::uint64_t result = 0;

  unsigned warp() const { return rank / warp_size; }
  unsigned lane() const { return rank % warp_size; }
  unsigned bit() const { return 1u << lane(); }
};

// Each lane is in at most one of the sets; while it runs, and once it has ended, in none.
struct Warp {
  unsigned exists = 0;
  unsigned ready = 0;
  unsigned waiting = 0;  // at a warp collective
  unsigned parked = 0;   // at a barrier of the block

  unsigned ended() const { return exists & ~(ready | waiting | parked); }
};

class Block {
 public:
  // ---- for the host ----

  void begin_launch(Index3 shape, std::size_t dynamic_bytes, Schedule schedule, unsigned seed,
                    std::function<void()> body) {
    body_ = std::move(body);
    schedule_ = schedule;
    random_.seed(seed);
    memory_.begin_launch(dynamic_bytes);
    threads_.clear();
    warps_.assign((shape.x * shape.y * shape.z + warp_size - 1) / warp_size, Warp{});
    for (unsigned z = 0; z < shape.z; ++z)
      for (unsigned y = 0; y < shape.y; ++y)
        for (unsigned x = 0; x < shape.x; ++x) {
          Thread thread{{x, y, z}, static_cast<unsigned>(threads_.size())};
          warps_[thread.warp()].exists |= thread.bit();
          threads_.push_back(thread);
        }
  }

  // Runs every thread to its end, or throws std::runtime_error with what went wrong.
  void run() {
    begin_block();
    for (;;) {
      while (ready_warps_ != 0) advance(choose());
      if (live_ == 0) break;
      release_barrier();
    }
    if (std::string damage = memory_.damage(); !damage.empty()) throw std::runtime_error(damage);
  }

  // After a failed launch: forgets the threads that will never end.
  void abandon() {
    pool_.clear();
    threads_.clear();
  }

  // ---- for the kernel, from the thread that runs ----

  static Block& current() { return *running_block; }
  static Thread& thread() { return *running_thread; }

  SharedMemory& memory() { return memory_; }

  // Waits until all threads that have not ended wait at the same barrier; returns the number with a non-zero
  // operand, of how many in all.
  struct Votes {
    unsigned yes, all;
  };
  Votes wait_for_block(Collective what, bool predicate, Site site) {
    Thread& self = thread();
    self.wait = {what, site, 0, predicate, 0};
    warps_[self.warp()].parked |= self.bit();
    self.fiber->suspend();
    return votes_;
  }

  // Waits until every lane in the mask takes part in this collective; returns the value that a shuffle brings
  // this lane, or the set of lanes that voted yes.
  std::uint64_t wait_for_warp(Collective what, unsigned mask, std::uint64_t operand, unsigned source_lane,
                              Site site) {
    Thread& self = thread();
    Warp& warp = warps_[self.warp()];
    self.wait = {what, site, mask, operand, source_lane};
    if (unsigned missing = mask & ~warp.exists)
      fail(describe(self) + ": the mask names " + lanes(missing) + ", which the last warp of a block of " +
           std::to_string(threads_.size()) + " threads does not have; launch whole warps");
    if (!(mask & self.bit()))
      fail(describe(self) + ": the mask does not name the caller, lane " + std::to_string(self.lane()));
    warp.waiting |= self.bit();
    self.fiber->suspend();
    return self.result;
  }

  // Ends the launch with this message. An exception could not leave the stack of a fiber.
  [[noreturn]] void fail(std::string message) {
    failure_.swap(message);
    for (;;) thread().fiber->suspend();
  }

 private:
  void begin_block() {
    memory_.begin_block();
    failure_.clear();
    live_ = static_cast<unsigned>(threads_.size());
    ready_warps_ = 0;
    for (unsigned w = 0; w < warps_.size(); ++w) {
      warps_[w].ready = warps_[w].exists;
      warps_[w].waiting = warps_[w].parked = 0;
      ready_warps_ |= 1u << w;
    }
    running_block = this;
    draw_habits();
  }

  // Between two barriers of the block the shuffled schedule either changes warps often, which mixes their
  // threads, or stays with one for several collectives, which lets it run ahead of the others as it may on a
  // GPU. Each finds races that the other does not.
  void draw_habits() {
    favourite_ = any(ready_warps_);
    patience_ = 1u << random_() % 8;
  }

  Thread& choose() {
    unsigned w = 0, lane = 0;
    switch (schedule_) {
      case Schedule::ascending:
        w = lowest(ready_warps_);
        lane = lowest(warps_[w].ready);
        break;
      case Schedule::descending:
        w = highest(ready_warps_);
        lane = highest(warps_[w].ready);
        break;
      case Schedule::shuffled:
        if (!(ready_warps_ >> favourite_ & 1) || random_() % patience_ == 0) favourite_ = any(ready_warps_);
        w = favourite_;
        lane = any(warps_[w].ready);
        break;
    }
    return threads_[w * warp_size + lane];
  }

  // Runs one thread until it waits or ends.
  void advance(Thread& self) {
    Warp& warp = warps_[self.warp()];
    warp.ready &= ~self.bit();
    if (self.fiber == nullptr) self.fiber = &pool_.take();
    running_thread = &self;
    self.fiber->resume();
    if (!self.fiber->stack_intact())
      throw std::runtime_error("thread " + std::to_string(self.rank) + " ran over its stack of " +
                               std::to_string(stack_bytes) +
                               " bytes: local arrays that large belong in memory given by the caller");
    if (!failure_.empty()) throw std::runtime_error(failure_);

    if (warp.waiting & self.bit()) {
      complete_warp_collective(warp, self);
    } else if (!(warp.parked & self.bit())) {
      pool_.give(*self.fiber);
      self.fiber = nullptr;
      --live_;
    }
    if (warp.ready == 0) ready_warps_ &= ~(1u << self.warp());
  }

  static void run_kernel_thread() {
    Block& block = current();
    try {
      block.body_();
    } catch (const std::exception& error) {
      block.failure_ = std::string("an exception left the kernel: ") + error.what();
    } catch (...) {
      block.failure_ = "an exception left the kernel";
    }
  }

  // Gives all lanes of the collective their results at once, before any of them runs on: no lane can read
  // what another has already overwritten with its operand for the next collective.
  void complete_warp_collective(Warp& warp, const Thread& last) {
    const unsigned mask = last.wait.mask;
    if ((warp.waiting & mask) != mask || disagreeing(last) != 0) return;
    Thread* const lane = &threads_[last.warp() * warp_size];
    unsigned ballot = 0;
    for (unsigned rest = mask; rest != 0; rest &= rest - 1)
      if (lane[lowest(rest)].wait.operand != 0) ballot |= 1u << lowest(rest);
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
      Thread& self = lane[lowest(rest)];
      const unsigned source = self.wait.source_lane;
      if (is_vote(self.wait.what))
        self.result = ballot;
      else  // the value of a lane that takes no part is undefined: a NaN makes its use visible
        self.result = mask >> source & 1 ? lane[source].wait.operand : ~std::uint64_t{0};
    }
    warp.waiting &= ~mask;
    warp.ready |= mask;
    ready_warps_ |= 1u << last.warp();
  }

  // The lanes that `self` waits for and that wait in another collective or with another mask.
  unsigned disagreeing(const Thread& self) const {
    const Thread* const lane = &threads_[self.warp() * warp_size];
    unsigned found = 0;
    for (unsigned rest = self.wait.mask & warps_[self.warp()].waiting; rest != 0; rest &= rest - 1) {
      const Wait& other = lane[lowest(rest)].wait;
      if (other.what != self.wait.what || other.mask != self.wait.mask) found |= rest & -rest;
    }
    return found;
  }

  // Called when no thread can run: either all wait at one barrier, or the kernel is wrong.
  void release_barrier() {
    const Wait* first = nullptr;
    unsigned parked = 0;
    bool same = true;
    votes_ = {0, live_};
    for (const Thread& thread : threads_) {
      if (!(warps_[thread.warp()].parked & thread.bit())) continue;
      if (first == nullptr) first = &thread.wait;
      same = same && thread.wait.what == first->what && thread.wait.site == first->site;
      votes_.yes += thread.wait.operand != 0;
      ++parked;
    }
    if (parked != live_ || !same) throw std::runtime_error(diagnosis());
    for (unsigned w = 0; w < warps_.size(); ++w) {
      warps_[w].ready = warps_[w].parked;
      warps_[w].parked = 0;
      if (warps_[w].ready != 0) ready_warps_ |= 1u << w;
    }
    draw_habits();
  }

  // ---- reports ----

  // Why nobody can go on, then who waits where.
  std::string diagnosis() const {
    std::string reason;
    bool warp_collective = false;
    for (const Thread& thread : threads_) {
      const Warp& warp = warps_[thread.warp()];
      if (!(warp.waiting & thread.bit())) continue;
      warp_collective = true;
      if (const unsigned gone = thread.wait.mask & warp.ended()) {
        reason = "a warp collective names lanes that have ended: ";
        reason += describe(thread) + " waits for " + lanes(gone);
        break;
      }
      if (reason.empty() && disagreeing(thread) != 0)
        reason = "lanes of warp " + std::to_string(thread.warp()) +
                 " that name each other wait in different warp collectives";
    }
    if (reason.empty() && warp_collective) reason = "deadlock";
    if (reason.empty()) reason = "divergent barrier: threads of one block wait at different barriers";
    return reason + ". " + who_waits_where();
  }

  std::string who_waits_where() const {
    std::vector<std::pair<std::string, std::vector<unsigned>>> groups;
    for (const Thread& thread : threads_) {
      const Warp& warp = warps_[thread.warp()];
      std::string state = warp.ended() & thread.bit() ? "ended" : "wait at " + describe(thread.wait);
      auto group = groups.begin();
      while (group != groups.end() && group->first != state) ++group;
      if (group == groups.end()) group = groups.insert(groups.end(), {std::move(state), {}});
      group->second.push_back(thread.rank);
    }
    std::string text;
    for (const auto& [state, ranks] : groups)
      text += (text.empty() ? "" : "; ") + ranges("thread", ranks) + " " + state;
    return text;
  }

  static std::string describe(const Wait& wait) {
    const std::string mask = is_warp_collective(wait.what) ? " with mask " + hexadecimal(wait.mask) : "";
    return name_of(wait.what) + mask + " (" + where(wait.site) + ")";
  }

  static std::string describe(const Thread& thread) {
    return "thread " + std::to_string(thread.rank) + " at " + describe(thread.wait);
  }

  static std::string lanes(unsigned mask) {
    std::vector<unsigned> members;
    for (; mask != 0; mask &= mask - 1) members.push_back(lowest(mask));
    return ranges("lane", members);
  }

  // ---- sets of up to 32 members ----

  static unsigned lowest(unsigned set) { return __builtin_ctz(set); }
  static unsigned highest(unsigned set) { return 31 - __builtin_clz(set); }
  unsigned any(unsigned set) {
    for (auto skip = random_() % __builtin_popcount(set); skip > 0; --skip) set &= set - 1;
    return lowest(set);
  }

  static inline thread_local Block* running_block = nullptr;
  static inline thread_local Thread* running_thread = nullptr;

  std::function<void()> body_;
  Schedule schedule_ = Schedule::ascending;
  std::minstd_rand random_;
  unsigned favourite_ = 0;  // the shuffled schedule's warp of the moment
  unsigned patience_ = 1;   // threads it runs there, on average

  SharedMemory memory_;
  FiberPool pool_{max_block_threads, &Block::run_kernel_thread};
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  unsigned ready_warps_ = 0;  // those with a lane that can run
  unsigned live_ = 0;         // threads that have not ended
  Votes votes_{};             // of the last barrier
  std::string failure_;
};

}  // namespace zoo::emu
