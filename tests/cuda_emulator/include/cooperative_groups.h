// The barriers of cooperative groups, for the host. See emulator.h.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct thread_block {
  void sync(EMULATOR_HERE) const { emulator::Block::running().sync_block({"thread_block::sync", file, line}); }
};
struct grid_group {
  void sync(EMULATOR_HERE) const { emulator::Block::running().sync_grid({"grid_group::sync", file, line}); }

  // An arrival is a barrier of the block, as in CUDA; the others are met at the wait. Between the two a block may touch
  // its own shared memory and what no block writes, which is not checked.
  using arrival_token = unsigned;
  arrival_token barrier_arrive(EMULATOR_HERE) const {
    emulator::Block::running().sync_block({"grid_group::barrier_arrive", file, line});
    return 0;
  }
  void barrier_wait(arrival_token &&, EMULATOR_HERE) const {
    emulator::Block::running().sync_grid({"grid_group::barrier_wait", file, line});
  }
};

inline thread_block this_thread_block() { return {}; }
inline grid_group this_grid() { return {}; }

} // namespace cooperative_groups
