// Memory of large results, which stays with the process when a tensor is freed, for the next one of its size.
//
// glibc maps a block of 32 MiB or more anew at every call and gives it back when it is freed, so the system finds and
// clears each page again: for the gradients of a large flow that takes as long as the arithmetic (docs/performance.md).
#pragma once

#include <cstdint>

namespace iin_fast {

constexpr int64_t kept_from = 1 << 20; // bytes; glibc keeps smaller blocks by itself

// At least `bytes` bytes without values, on a cache line. Of one size they are the same bytes again. A block has two
// holders, who takes it and the tensor that is made of it, and is free once both have given it back.
struct KeptBlock;
KeptBlock *take_kept(int64_t bytes);
void *kept_data(const KeptBlock *block);
void give_back(KeptBlock *block) noexcept; // from any thread
bool is_held_twice(const KeptBlock *block);

bool keeps_memory(); // false once a limit of 0 is set

} // namespace iin_fast
