// Runs CUDA kernels on the host, for tests: csrc/*/*_kernels.cuh compiles against the headers of this folder with g++.
//
// A block's threads are fibers on one thread of the machine, run in turn until each waits or ends. Kernels compute what
// they would on a GPU, in a fixed order, and mistakes that a GPU may let pass are reported as Fault:
//
//   - a __syncthreads, or a barrier over the grid, that some threads don't reach, or reach at another line
//   - a warp function whose mask lacks the caller, names lanes that never come, or reads a lane outside of it
//   - a misaligned __ldg, matrix load or asynchronous copy; a grid or block that no GPU would take
//   - asynchronous copies that nobody waited for when their thread ended; what they bring is NaN until then
//
// Compiled with -fsanitize=address,alignment,bounds it reports accesses out of bounds too: of global memory (heap),
// of dynamic shared memory beyond what the launch asked for, and of arrays of known size such as static shared ones.
//
// Compiled with -fsanitize=thread and races.cpp it reports races: a missing barrier, whatever it does to the result.
//
// Not emulated: the memory model, speed, and threads of a block that run at the same time. Without races.cpp a missing
// barrier shows only where a result depends on the order in which threads run: a warp runs as far as it can, then the
// next one, up or down the block as drawn (but the same in each run) whenever all have had their turn.
//
// Shared memory is thread_local. Blocks of a plain launch run one after another, those of a cooperative launch each on
// a thread of the machine, of which only one runs at a time. Clusters run one after another, each as such a launch.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace emulator {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where in the kernel a function was called.
struct Site {
  const char *function, *file;
  int line;
  std::string text() const {
    const char *name = std::strrchr(file, '/');
    return std::string(function) + " at " + (name ? name + 1 : file) + ":" + std::to_string(line);
  }
};

constexpr unsigned warp_size = 32;
constexpr size_t largest_shared = 227 * 1024; // of one block on sm_90 and sm_100

// An asynchronous copy of 16 bytes, of which the first `bytes` come from global memory.
struct Copy {
  Site site;
  void *shared;
  const void *global;
  int bytes;
  unsigned char begun[16]; // what lay there when it began: a GPU reads at any time from then on
};

// What a fiber runs on. It outlives its thread of the block: the next one goes on where that one ended, in
// Block::enter().
struct Stack {
  std::unique_ptr<char[]> memory{new char[stack_bytes]};
  ucontext_t beginning; // where it starts
  jmp_buf context;      // where it goes on
  bool begun = false;
  void *fake_stack = nullptr; // AddressSanitizer's
};

struct Fiber {
  enum State { ready, at_block_barrier, at_grid_barrier, in_warp_function, done };
  std::unique_ptr<Stack> stack;
  uint3 index;
  State state = ready;
  Site site{};
  unsigned mask = 0;       // of a warp function
  void *payload = nullptr; // of a warp function
  std::vector<std::vector<Copy>> copies =
      std::vector<std::vector<Copy>>(1); // asynchronous ones in groups; the last group is open
};

// The blocks of a cooperative launch, or of a cluster. `turn` is held by the one block that runs.
struct Grid {
  std::mutex turn;
  std::condition_variable changed;
  unsigned first = 0, blocks = 0, waiting = 0, ended = 0, generation = 0;
  std::exception_ptr fault;

  void fail(std::exception_ptr reason) {
    if (!fault)
      fault = reason;
    changed.notify_all();
  }
  // A barrier that can't be completed any more is a fault of those who wait there.
  void check() {
    if (waiting > 0 && ended > 0 && waiting + ended == blocks)
      fail(std::make_exception_ptr(Fault("divergent grid barrier: " + std::to_string(ended) +
                                         " blocks left the kernel, " + std::to_string(waiting) + " wait")));
  }
};

class Block {
public:
  Block(const std::function<void()> &body, Grid *grid = nullptr) : body_(body), grid_(grid) {}

  void run() {
    Block *const before = running_;
    running_ = this;
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    place_.block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    place_.together = grid_ == nullptr ? 0 : grid_->first;
    races::new_owner();
    fibers_ = std::vector<Fiber>(threads);
    for (unsigned i = 0; i < threads; ++i) {
      Fiber &fiber = fibers_[i];
      fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      fiber.stack = take_stack();
    }
    try {
      schedule();
    } catch (...) {
      fault_ = std::current_exception();
    }
    running_ = before;
    if (fault_)
      std::rethrow_exception(fault_); // the stacks of suspended fibers go with the fibers
    for (Fiber &fiber : fibers_)
      spare_stacks_.push_back(std::move(fiber.stack));
  }

  static Block &running() { return *running_; }

  void sync_block(Site site) {
    const races::Aside aside;
    wait(Fiber::at_block_barrier, site);
    if (++at_barrier_ == fibers_.size()) {
      at_barrier_ = 0;
      ++place_.barriers;
      check_one_site("divergent barrier");
      release(Fiber::at_block_barrier);
    } else {
      leave();
    }
  }

  void sync_grid(Site site) {
    if (grid_ == nullptr)
      throw Fault(site.text() + ": a barrier over the grid needs a cooperative launch");
    const races::Aside aside;
    wait(Fiber::at_grid_barrier, site);
    leave(); // schedule() meets the other blocks once all threads of this one are here
  }

  void sleep() {
    const races::Aside aside;
    slept_ = true;
    leave();
  }

  void copy_async(Site site, void *shared, const void *global, int bytes) {
    if (bytes < 0 || bytes > 16 || reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
        reinterpret_cast<uintptr_t>(global) % 16 != 0)
      throw Fault("misaligned " + site.text() + ", or of more than 16 bytes");
    races::access(shared, 16, true);
    races::access(global, bytes, false);
    const races::Aside aside;
    std::memset(shared, 0xff, 16);
    Copy copy{site, shared, global, bytes, {}};
    std::memcpy(copy.begun, global, bytes);
    fibers_[current_].copies.back().push_back(copy);
  }

  void commit_copies() {
    const races::Aside aside;
    fibers_[current_].copies.emplace_back();
  }

  // Finishes all groups of this thread but the last `groups` (and the open one). In line, so that a race's place is its
  // caller's.
  __attribute__((always_inline)) void wait_copies(size_t groups) {
    std::vector<std::vector<Copy>> &copies = fibers_[current_].copies;
    while (copies.size() > groups + 1) {
      for (const Copy &copy : copies.front()) {
        races::access(copy.shared, 16, true);
        races::access(copy.global, copy.bytes, false);
        const races::Aside aside;
        if (std::memcmp(copy.begun, copy.global, copy.bytes) != 0)
          throw Fault("the source changed under an asynchronous copy, " + copy.site.text());
        std::memset(copy.shared, 0, 16);
        std::memcpy(copy.shared, copy.global, copy.bytes);
      }
      const races::Aside aside;
      copies.erase(copies.begin());
    }
  }

  // Meets the other lanes of `mask`. The last one to come calls combine(payloads, mask), payloads[lane] being null for
  // lanes that take no part; the others' payloads live on their stacks meanwhile.
  void warp_function(Site site, unsigned mask, void *payload,
                     const std::function<void(void *const *payloads, unsigned mask)> &combine) {
    const races::Aside aside;
    const unsigned first = current_ / warp_size * warp_size, lane = current_ % warp_size;
    if (!(mask >> lane & 1))
      throw Fault(describe(current_) + " calls " + site.text() + " with a mask that doesn't name it");
    wait(Fiber::in_warp_function, site);
    fibers_[current_].mask = mask;
    fibers_[current_].payload = payload;
    void *payloads[warp_size] = {};
    for (unsigned other = 0; other < warp_size; ++other) {
      if (!(mask >> other & 1))
        continue;
      if (first + other >= fibers_.size())
        throw Fault(site.text() + ": the mask names lane " + std::to_string(other) + ", which the block doesn't have");
      const Fiber &fiber = fibers_[first + other];
      if (fiber.state != Fiber::in_warp_function)
        return leave();
      if (fiber.mask != mask || std::strcmp(fiber.site.function, site.function) != 0)
        throw Fault("divergent warp: " + describe(current_) + " at " + site.text() + ", " + describe(first + other) +
                    " at " + fiber.site.text() + ", which differ in function or mask");
      payloads[other] = fiber.payload;
    }
    combine(payloads, mask);
    for (unsigned other = 0; other < warp_size; ++other)
      if (mask >> other & 1)
        fibers_[first + other].state = Fiber::ready;
  }

private:
  static std::unique_ptr<Stack> take_stack() {
    if (spare_stacks_.empty())
      return std::make_unique<Stack>();
    std::unique_ptr<Stack> stack = std::move(spare_stacks_.back());
    spare_stacks_.pop_back();
    return stack;
  }

  // One thread of a block after the other.
  static void enter() {
    Stack &stack = *running_->fibers_[running_->current_].stack;
    for (arrived(nullptr);; leave(stack)) {
      Block &block = *running_;
      try {
        block.body_();
        for (const std::vector<Copy> &group : block.fibers_[block.current_].copies)
          if (!group.empty())
            throw Fault(describe(block.current_) + " ended before its asynchronous copies");
      } catch (...) {
        block.fault_ = std::current_exception();
      }
      races::run(nullptr);
      block.fibers_[block.current_].state = Fiber::done;
    }
  }

  void schedule() {
    const unsigned warps = (fibers_.size() + warp_size - 1) / warp_size;
    for (unsigned random = blockIdx.x * 2654435761u;; random = random * 1664525u + 1013904223u) {
      // up or down: code that leans on an order, for want of a barrier, gets it only half the time
      const bool down = random >> 31;
      bool progress = false;
      slept_ = false;
      for (unsigned i = 0; i < warps; ++i)
        progress |= run_warp(down ? warps - 1 - i : i, down);
      if (count(Fiber::done) == fibers_.size())
        return;
      if (grid_ && slept_) { // a thread waits for another block by hand
        grid_->turn.unlock();
        std::this_thread::yield();
        grid_->turn.lock();
        if (grid_->fault)
          std::rethrow_exception(grid_->fault);
      }
      if (progress)
        continue;
      if (grid_ == nullptr || count(Fiber::at_grid_barrier) != fibers_.size())
        throw Fault(deadlock());
      check_one_site("divergent grid barrier");
      meet_grid();
      ++place_.barriers, ++place_.grid_barriers;
      release(Fiber::at_grid_barrier);
    }
  }

  // Runs a warp until each of its threads waits for another warp, sleeps or is done; false if none could run.
  bool run_warp(unsigned warp, bool down) {
    const size_t first = warp * warp_size, lanes = std::min<size_t>(warp_size, fibers_.size() - first);
    bool ever = false, progress;
    do {
      progress = false;
      for (size_t i = 0; i < lanes; ++i) {
        current_ = first + (down ? lanes - 1 - i : i);
        if (fibers_[current_].state != Fiber::ready)
          continue;
        ever = progress = true;
        threadIdx = fibers_[current_].index;
        resume(fibers_[current_]);
        if (fault_)
          std::rethrow_exception(fault_);
      }
    } while (progress && !slept_);
    return ever;
  }

  void meet_grid() {
    std::unique_lock<std::mutex> lock(grid_->turn, std::adopt_lock);
    const unsigned generation = grid_->generation;
    if (++grid_->waiting == grid_->blocks) {
      grid_->waiting = 0;
      ++grid_->generation;
      grid_->changed.notify_all();
    } else {
      grid_->check();
      grid_->changed.wait(lock, [&] { return grid_->generation != generation || grid_->fault; });
    }
    lock.release(); // the turn stays with this block
    if (grid_->fault)
      std::rethrow_exception(grid_->fault);
  }

  void wait(Fiber::State state, Site site) {
    fibers_[current_].state = state;
    fibers_[current_].site = site;
  }

  size_t count(Fiber::State state) const {
    size_t found = 0;
    for (const Fiber &fiber : fibers_)
      found += fiber.state == state;
    return found;
  }

  void release(Fiber::State state) {
    for (Fiber &fiber : fibers_)
      if (fiber.state == state)
        fiber.state = Fiber::ready;
  }

  void check_one_site(const char *what) const {
    for (size_t i = 1; i < fibers_.size(); ++i)
      if (fibers_[i].site.line != fibers_[0].site.line || std::strcmp(fibers_[i].site.file, fibers_[0].site.file) != 0)
        throw Fault(std::string(what) + ": " + describe(0) + " at " + fibers_[0].site.text() + ", " + describe(i) +
                    " at " + fibers_[i].site.text());
  }

  static std::string describe(size_t thread) { return "thread " + std::to_string(thread); }

  // No thread can go on: one example of each state.
  std::string deadlock() const {
    std::ostringstream text;
    text << (count(Fiber::at_block_barrier) ? "divergent barrier" : "deadlock") << " in block (" << blockIdx.x << ", "
         << blockIdx.y << ", " << blockIdx.z << "):";
    const char *separator = " ";
    for (const Fiber::State state :
         {Fiber::at_block_barrier, Fiber::at_grid_barrier, Fiber::in_warp_function, Fiber::done})
      for (size_t i = 0; i < fibers_.size(); ++i)
        if (fibers_[i].state == state) {
          text << separator << count(state) << " threads (the first is " << i << ") "
               << (state == Fiber::done ? "left the kernel" : "wait in " + fibers_[i].site.text());
          separator = ", ";
          break;
        }
    return text.str();
  }

  // Switching, with what AddressSanitizer must know of it. The functions of <ucontext.h> ask the kernel for the mask of
  // signals, which takes many times as long as a jump, so a fiber only begins with them.
  void resume(Fiber &fiber) {
    Stack &stack = *fiber.stack;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stack.memory.get(), stack_bytes);
#endif
    place_.thread = current_, place_.stack = stack.memory.get();
    if (_setjmp(scheduler_) == 0) {
      if (!stack.begun)
        begin(stack);
      races::run(&place_);
      _longjmp(stack.context, 1);
    }
    races::run(nullptr);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
  }

  void begin(Stack &stack) {
    stack.begun = true;
    getcontext(&stack.beginning);
    stack.beginning.uc_stack.ss_sp = stack.memory.get();
    stack.beginning.uc_stack.ss_size = stack_bytes;
    stack.beginning.uc_link = nullptr;
    makecontext(&stack.beginning, &Block::enter, 0);
    races::run(&place_);
    setcontext(&stack.beginning);
  }

  // Back to the block's scheduler, until it resumes this stack: by then another block may be the one that runs.
  static void leave(Stack &stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&stack.fake_stack, running_->scheduler_stack_, running_->scheduler_stack_bytes_);
#endif
    if (_setjmp(stack.context) == 0)
      _longjmp(running_->scheduler_, 1);
    arrived(stack.fake_stack);
  }

  void leave() { leave(*fibers_[current_].stack); }

  static void arrived(void *fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &running_->scheduler_stack_, &running_->scheduler_stack_bytes_);
#else
    (void)fake_stack;
#endif
  }

  inline static thread_local Block *running_ = nullptr;
  inline static thread_local std::vector<std::unique_ptr<Stack>> spare_stacks_;

  const std::function<void()> &body_;
  Grid *grid_;
  std::vector<Fiber> fibers_;
  size_t current_ = 0, at_barrier_ = 0;
  Place place_;
  bool slept_ = false;
  std::exception_ptr fault_;
  jmp_buf scheduler_;
  void *scheduler_fake_stack_ = nullptr;
  const void *scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

// Dynamic shared memory of the block that begins, all of it inaccessible beyond `bytes` (cuda_runtime.h).
void prepare_dynamic_shared(size_t bytes);

// Starts kernels: launch(kernel, grid, block, arguments...).
struct Launch {
  size_t shared_bytes = 0;  // dynamic shared memory
  bool cooperative = false; // all blocks at once, so that the kernel may use barriers over the grid
  int *launches = nullptr;  // counts, if given
  int resident = 0;     // blocks that run at once, for blocks_together; negative: so many, but the launch is refused
  int clusters = 0;     // that run at once, for clusters_together
  unsigned cluster = 0; // blocks of a cluster, which meet each other alone; 0: no clusters

  Launch with_shared(size_t bytes) const { return {bytes, cooperative, launches, resident, clusters, cluster}; }
  Launch together(size_t bytes) const { return {bytes, true, launches, resident, clusters, cluster}; }
  Launch in_clusters(unsigned size, size_t bytes) const { return {bytes, true, launches, resident, clusters, size}; }
  template <class Kernel> int clusters_together(Kernel *, int, size_t, unsigned) const { return clusters; }
  template <class Kernel> int blocks_together(Kernel *, int, size_t) const { return std::abs(resident); }
  int shared_room() const { return 48 * 1024; } // what every GPU has: more is asked for by name
  int multiprocessors() const { return std::min(std::abs(resident), 12); }

  template <class... Parameters, class... Arguments>
  bool operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments &&...arguments) const {
    if (cooperative && resident < 0)
      return false;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.z > 64)
      throw Fault("invalid block: " + std::to_string(threads) + " threads");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
      throw Fault("invalid grid: (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                  std::to_string(grid.z) + ")");
    if (shared_bytes > largest_shared)
      throw Fault("invalid launch: " + std::to_string(shared_bytes) + " bytes of shared memory");
    if (launches)
      ++*launches;
    races::begin_launch();
    const std::function<void()> body = [&] { kernel(arguments...); };
    const unsigned blocks = grid.x * grid.y * grid.z;
    const auto prepare = [&](unsigned i) {
      gridDim = grid;
      blockDim = block;
      blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      prepare_dynamic_shared(shared_bytes);
    };
    if (!cooperative) {
      for (unsigned i = 0; i < blocks; ++i) {
        prepare(i);
        Block(body).run();
      }
      check_races();
      return true;
    }
    const unsigned group = cluster == 0 ? blocks : cluster;
    if (blocks % group != 0)
      throw Fault("invalid launch: " + std::to_string(blocks) + " blocks in clusters of " + std::to_string(group));
    for (unsigned first = 0; first < blocks; first += group)
      run_together(body, first, group, prepare);
    check_races();
    return true;
  }

private:
  // Blocks that may meet, each on a thread of the machine.
  template <class Prepare>
  void run_together(const std::function<void()> &body, unsigned first, unsigned count, const Prepare &prepare) const {
    Grid all;
    all.blocks = count, all.first = first;
    std::vector<std::thread> workers;
    for (unsigned i = first; i < first + count; ++i)
      workers.emplace_back([&, i] {
        all.turn.lock();
        prepare(i);
        try {
          if (!all.fault)
            Block(body, &all).run();
          ++all.ended;
          all.check();
        } catch (...) {
          ++all.ended;
          all.fail(std::current_exception());
        }
        prepare_dynamic_shared(largest_shared); // accessible again, before the thread gives its memory back
        races::new_owner();
        all.turn.unlock();
      });
    for (std::thread &worker : workers)
      worker.join();
    if (all.fault)
      std::rethrow_exception(all.fault);
  }

  static void check_races() {
    if (const std::string race = races::first(); !race.empty())
      throw Fault(race);
  }
};

} // namespace emulator
