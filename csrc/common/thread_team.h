// A team of threads that stays awake for the length of one op.
//
// An op of a hundred short steps would pay for starting torch's pool at every step. Here the pool is started once: its
// first thread leads and walks through the op, the others wait on one word of memory for the next step. Measured gain:
// docs/performance.md, "flow on the CPU".
//
// Nobody waits for a thread that has not joined: the leader counts who is there at each step and shares it among them,
// so a pool that starts a thread late, or none at all, costs speed alone. Steps must not depend on which thread runs
// what.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace iin_fast {

class ThreadTeam {
public:
  using Body = void (*)(int64_t begin, int64_t end, void *data);

  // The leader, in turn: start, any number of run, close.
  void start() { started_.store(true, std::memory_order_release); }

  // body on contiguous parts of [0, count), by all who have joined.
  void run(int64_t count, Body body, void *data) {
    const int64_t members = joined_.load(std::memory_order_acquire);
    if (members == 0 || count <= 1) {
      body(0, count, data);
      return;
    }
    step_ = {count, members + 1, body, data};
    done_.store(0, std::memory_order_relaxed);
    ++steps_;
    ticket_.store(steps_ << member_bits | static_cast<uint64_t>(members), std::memory_order_release);
    const Clock::duration took = share(0);
    wait(took, [&] { return done_.load(std::memory_order_acquire) == members; });
  }

  void close() { ticket_.store(closed, std::memory_order_release); }

  // Every other thread, once.
  void work() {
    // a pool that runs its pieces one after the other may call this before start; then the leader will do without
    const auto patience = Clock::now() + std::chrono::milliseconds(1);
    while (!started_.load(std::memory_order_acquire)) {
      if (Clock::now() > patience)
        return;
      std::this_thread::yield();
    }
    // read before joining: a step that counts this member is then sure to be seen
    uint64_t seen = ticket_.load(std::memory_order_acquire);
    if (seen == closed)
      return;
    const uint64_t id = static_cast<uint64_t>(joined_.fetch_add(1, std::memory_order_acq_rel)) + 1;
    for (Clock::duration took{};;) {
      uint64_t now = seen;
      wait(took, [&] { return (now = ticket_.load(std::memory_order_acquire)) != seen; });
      if (now == closed)
        return;
      seen = now;
      // the leader waits for members alone, so only they may look at the step
      if (id <= (now & ((uint64_t(1) << member_bits) - 1))) {
        took = share(static_cast<int64_t>(id));
        done_.fetch_add(1, std::memory_order_release);
      }
    }
  }

private:
  using Clock = std::chrono::steady_clock;

  struct Step {
    int64_t count, parts;
    Body body;
    void *data;
  };

  static constexpr int member_bits = 16;
  static constexpr uint64_t closed = ~uint64_t(0);

  // Gives the time that it took.
  Clock::duration share(int64_t part) const {
    const int64_t begin = step_.count * part / step_.parts, end = step_.count * (part + 1) / step_.parts;
    const Clock::time_point start = Clock::now();
    if (begin < end)
      step_.body(begin, end, step_.data);
    return Clock::now() - start;
  }

  // Spins for about as long as a step takes, then lets others run in between: the machine may be busy. Who yields may
  // get the processor back after milliseconds alone, so after a long step this spins for as long as that took.
  template <class Ready> static void wait(Clock::duration took, const Ready &ready) {
    constexpr int few = 4000;
    Clock::time_point patience;
    bool spins = true;
    for (int spin = 0; !ready(); ++spin) {
      if (spin == few)
        patience = Clock::now() + took;
      else if (spin > few && spins && spin % 64 == 0)
        spins = Clock::now() < patience;
      if (spin < few || spins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

  Step step_{};
  uint64_t steps_ = 0;
  alignas(64) std::atomic<uint64_t> ticket_{0}; // number of the step, and how many members it counts
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int64_t> joined_{0};
  std::atomic<bool> started_{false};
};

} // namespace iin_fast
