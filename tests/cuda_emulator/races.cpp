// A race checker for the emulated kernels, behind the calls that g++ -fsanitize=thread puts at every access to memory.
//
// ThreadSanitizer's own library knows threads of the machine; a block's threads are fibers on one of them. This one
// knows the order that a GPU promises: __syncthreads within a block, the barrier over the grid or a cluster, the
// launch, and nothing else. Whatever order the emulator runs threads in, two of them that touch the same bytes without
// a barrier between are a race, if one writes. An asynchronous copy writes when it begins and when it is waited for.
// What __ldg reads no thread may write in the same launch.
//
// Of each two bytes it keeps the last write and the last reads, so of several races it tells one. Shuffles and
// __syncwarp order nothing here, as no kernel counts on that; atomics are not looked at.
#include "races.h"

#include <dlfcn.h>
#include <link.h>

#include <array>
#include <cstdio>
#include <memory>
#include <unordered_map>
#include <utility>

namespace emulator::races {

namespace {

thread_local const Place *running = nullptr;

constexpr int64_t none = -1, several = -2;

struct Access {
  int64_t block = none, thread = none;
  uint32_t barriers = 0, grid_barriers = 0, together = 0;
  const void *code = nullptr;

  bool is(const Place &place) const { return block == place.block && thread == place.thread; }
  // Whether no barrier lies between this and what the thread does now.
  bool meets(const Place &now) const {
    return block != none && !is(now) &&
           (together != now.together ||
            (grid_barriers == now.grid_barriers && (block != now.block || barriers == now.barriers)));
  }
};

struct Cell { // of two bytes
  Access write, read;
  bool constant = false; // read by __ldg
};

constexpr size_t page_bytes = 4096;
using Page = std::array<Cell, page_bytes / 2>;

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages; // only one thread of the machine runs at a time
std::string found;
thread_local std::pair<uintptr_t, uintptr_t> shared; // where the shared memory of this thread of the machine is

Cell *cell(uintptr_t at, bool make) {
  std::unique_ptr<Page> &page = pages[at / page_bytes];
  if (!page) {
    if (!make)
      return nullptr;
    page = std::make_unique<Page>();
  }
  return &(*page)[at % page_bytes / 2];
}

// File and line of an instruction, as far as the debug information goes.
std::string line_of(const void *code) {
  Dl_info info;
  if (!dladdr(code, &info))
    return "an unknown place";
  char command[1024], text[256];
  snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%lx", info.dli_fname,
           static_cast<unsigned long>(static_cast<const char *>(code) - static_cast<const char *>(info.dli_fbase) - 1));
  std::string lines;
  if (FILE *const out = popen(command, "r")) {
    while (fgets(text, sizeof text, out)) {
      const std::string line(text, std::string(text).find_first_of(" \n"));
      lines += (lines.empty() ? "" : " in ") + line;
    }
    pclose(out);
  }
  return lines.empty() ? "an unknown place" : lines;
}

std::string who(int64_t thread, int64_t block) {
  const std::string name = thread == several ? "several threads" : "thread " + std::to_string(thread);
  return name + " of " + (block == several ? "several blocks" : "block " + std::to_string(block));
}

void report(const Access &before, const char *did, const void *code, const char *does, uintptr_t at) {
  if (!found.empty())
    return;
  const bool is_shared = at >= shared.first && at < shared.second;
  found = std::string("race in ") + (is_shared ? "shared" : "global") + " memory: " + who(before.thread, before.block) +
          did + line_of(before.code) + ", " + who(running->thread, running->block) + does + line_of(code) +
          ", and no barrier is between";
}

void look(Cell &c, const Place &now, uintptr_t at, bool write, bool constant, const void *code) {
  if (c.write.meets(now))
    report(c.write, " writes at ", code, write ? " writes at " : " reads at ", at);
  if (write && c.read.meets(now))
    report(c.read, " reads at ", code, " writes at ", at);
  c.constant |= constant;
  if (c.constant && (write || c.write.block != none))
    report(write ? c.read : c.write, write ? " reads by __ldg at " : " writes at ", code,
           write ? " writes at " : " reads by __ldg at ", at);
  Access next{now.block, now.thread, now.barriers, now.grid_barriers, now.together, code};
  if (!write && c.read.block != none && c.read.grid_barriers == now.grid_barriers) {
    if (c.read.block != now.block)
      next.block = next.thread = several;
    else if (c.read.barriers == now.barriers && c.read.thread != now.thread)
      next.thread = several;
  }
  (write ? c.write : c.read) = next;
}

void access_at(const void *from, size_t bytes, bool write, bool constant, const void *code) {
  const auto at = reinterpret_cast<uintptr_t>(from);
  const Place *const now = running; // finding a thread_local takes as long as all the rest
  if (now == nullptr || at - reinterpret_cast<uintptr_t>(now->stack) < stack_bytes)
    return;
  for (uintptr_t byte = at & ~uintptr_t(1); byte < at + bytes; byte += 2)
    look(*cell(byte, true), *now, byte, write, constant, code);
}

int find_shared(dl_phdr_info *info, size_t, void *code) {
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i)
    ours |=
        info->dlpi_phdr[i].p_type == PT_LOAD &&
        reinterpret_cast<uintptr_t>(code) - info->dlpi_addr - info->dlpi_phdr[i].p_vaddr < info->dlpi_phdr[i].p_memsz;
  for (int i = 0; ours && i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_TLS) {
      const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
      shared = {begin, begin + info->dlpi_phdr[i].p_memsz};
    }
  return ours;
}

} // namespace

const Place *run(const Place *next) { return std::exchange(running, next); }

void begin_launch() {
  pages.clear();
  found.clear();
}

void new_owner() {
  dl_iterate_phdr(find_shared, reinterpret_cast<void *>(&new_owner));
  for (uintptr_t at = shared.first; at < shared.second; at += 2)
    if (Cell *const old = cell(at, false))
      *old = Cell();
    else
      at = (at / page_bytes + 1) * page_bytes - 2;
}

void access(const void *at, size_t bytes, bool write, bool constant) {
  access_at(at, bytes, write, constant, __builtin_return_address(0));
}

std::string first() { return found; }

} // namespace emulator::races

// What the compiler calls.
#define CODE __builtin_return_address(0)
#define ACCESSES(bytes)                                                                                                \
  void __tsan_read##bytes(void *at) { emulator::races::access_at(at, bytes, false, false, CODE); }                     \
  void __tsan_write##bytes(void *at) { emulator::races::access_at(at, bytes, true, false, CODE); }                     \
  void __tsan_unaligned_read##bytes(void *at) { emulator::races::access_at(at, bytes, false, false, CODE); }           \
  void __tsan_unaligned_write##bytes(void *at) { emulator::races::access_at(at, bytes, true, false, CODE); }           \
  void __tsan_volatile_read##bytes(void *at) { emulator::races::access_at(at, bytes, false, false, CODE); }            \
  void __tsan_volatile_write##bytes(void *at) { emulator::races::access_at(at, bytes, true, false, CODE); }

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void *at, unsigned long bytes) { emulator::races::access_at(at, bytes, false, false, CODE); }
void __tsan_write_range(void *at, unsigned long bytes) { emulator::races::access_at(at, bytes, true, false, CODE); }
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// of the standard library's reference counts, in the emulator's own code
int __tsan_atomic32_fetch_add(volatile int *at, int value, int) {
  return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
}
