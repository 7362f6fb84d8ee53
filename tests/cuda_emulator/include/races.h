// Races between the threads of a kernel: two that touch the same memory, one of them writing, with no barrier between.
// See races.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulator {

constexpr size_t stack_bytes = 128 * 1024; // of a thread

// The thread that runs, and where it stands in the order that barriers make.
struct Place {
  uint32_t block = 0, thread = 0;
  uint32_t barriers = 0, grid_barriers = 0; // that its block has passed
  uint32_t together = 0;                    // the first of the blocks that it meets at barriers over the grid
  const char *stack = nullptr;              // memory that is its own
};

namespace races {

#if defined(EMULATOR_RACES)
const Place *run(const Place *); // whose accesses follow, null: the emulator's own; gives the one before
void begin_launch();             // all that was is ordered before
void new_owner();                // shared memory passes to the next block, or back to the machine
void access(const void *at, size_t bytes, bool write, bool constant = false); // constant: as __ldg reads
std::string first();                                                          // of this launch; empty: none
#else
inline const Place *run(const Place *) { return nullptr; }
inline void begin_launch() {}
inline void new_owner() {}
inline void access(const void *, size_t, bool, bool = false) {}
inline std::string first() { return {}; }
#endif

// While the emulator works for a thread, what it touches is not the kernel's.
class Aside {
public:
  Aside() : was_(run(nullptr)) {}
  ~Aside() { run(was_); }
  Aside(const Aside &) = delete;

private:
  const Place *was_;
};

} // namespace races
} // namespace emulator
