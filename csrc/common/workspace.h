// Working memory of a call, on a cache line.
//
// Up to 16 MiB stay with the calling thread. glibc hands out an aligned block that was freed once more only by luck;
// else the system finds and clears its pages anew, and 600 of them take as long as the backward of 50 rows
// (docs/performance.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace iin_fast {

class Workspace {
public:
  explicit Workspace(int64_t bytes) {
    constexpr int64_t most = 16 << 20;
    Kept &kept = of_thread();
    if (kept.in_use || bytes > most) {
      own_ = take(bytes);
      data_ = own_.get();
      return;
    }
    if (bytes > kept.size) {
      kept.size = 0, kept.memory.reset(); // before its successor is there
      kept.memory = take(bytes), kept.size = bytes;
    }
    kept.in_use = borrowed_ = true;
    data_ = kept.memory.get();
  }
  ~Workspace() {
    if (borrowed_)
      of_thread().in_use = false;
  }
  Workspace(const Workspace &) = delete;
  Workspace &operator=(const Workspace &) = delete;

  template <class T> T *as() const { return reinterpret_cast<T *>(data_); }

private:
  static constexpr std::align_val_t line{64};
  struct Free {
    void operator()(std::byte *memory) const { ::operator delete(memory, line); }
  };
  using Memory = std::unique_ptr<std::byte, Free>;
  struct Kept {
    Memory memory;
    int64_t size = 0;
    bool in_use = false;
  };

  static Memory take(int64_t bytes) { return Memory(static_cast<std::byte *>(::operator new(bytes, line))); }
  static Kept &of_thread() {
    thread_local Kept kept;
    return kept;
  }

  Memory own_;
  std::byte *data_ = nullptr;
  bool borrowed_ = false;
};

} // namespace iin_fast
