// The barriers of cooperative groups, for the host. See emulator.h.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct thread_block {
  void sync(EMULATOR_HERE) const { emulator::Block::running().sync_block({"thread_block::sync", file, line}); }
};
struct grid_group {
  void sync(EMULATOR_HERE) const { emulator::Block::running().sync_grid({"grid_group::sync", file, line}); }
};

inline thread_block this_thread_block() { return {}; }
inline grid_group this_grid() { return {}; }

} // namespace cooperative_groups
