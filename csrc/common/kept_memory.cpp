#include "common/kept_memory.h"

#include <algorithm>
#include <atomic>
#include <list>
#include <mutex>
#include <new>
#include <vector>

#include "common/tensor.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace iin_fast {

struct KeptBlock {
  void *data;
  int64_t bytes;
  std::atomic<int> holders{0};
};

namespace {

constexpr int64_t large_page = 2 << 20, large_from = 8 * large_page;

// Eight sizes for each power of two, so that batches of nearly one size share blocks.
int64_t rounded(int64_t bytes) {
  int64_t step = 1;
  while (step * 16 <= bytes)
    step *= 2;
  return (bytes + step - 1) / step * step;
}

std::align_val_t alignment(int64_t bytes) { return std::align_val_t{bytes >= large_from ? size_t(large_page) : 64u}; }

KeptBlock *mapped(int64_t bytes) {
  void *data = ::operator new(bytes, alignment(bytes));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= large_from) // a hint; where the system has no such pages nothing changes
    madvise(data, bytes / large_page * large_page, MADV_HUGEPAGE);
#endif
  return new KeptBlock{data, bytes};
}

void unmap(KeptBlock *block) {
  ::operator delete(block->data, alignment(block->bytes));
  delete block;
}

class Store {
public:
  static Store &get() {
    static Store *const store = new Store; // never destroyed: tensors may outlive everything
    return *store;
  }

  KeptBlock *take(int64_t bytes) {
    bytes = rounded(bytes);
    KeptBlock *block = take_free(bytes);
    if (block == nullptr) {
      try {
        block = mapped(bytes);
      } catch (const std::bad_alloc &) {
        drop(0); // what is kept may be what is missing
        block = mapped(bytes);
      }
    }
    block->holders = 2;
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ += bytes;
    most_used_ = std::max(most_used_, in_use_);
    return block;
  }

  void give_back(KeptBlock *block) {
    int64_t most = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      in_use_ -= block->bytes;
      try {
        free_.push_back(block);
      } catch (const std::bad_alloc &) { // no room for the note that it is there
        return unmap(block);
      }
      kept_ += block->bytes;
      // For a few sizes in turn, say of training and evaluation; results of ever new sizes don't pile up.
      most = std::min(limit_.load(), 3 * most_used_);
    }
    drop(most);
  }

  void set_limit(int64_t bytes) {
    limit_ = bytes;
    drop(bytes);
  }
  int64_t limit() const { return limit_; }
  std::vector<int64_t> sizes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {limit_, in_use_, kept_};
  }

private:
  Store() {
#if defined(__linux__)
    // A child of fork may free tensors while another thread of its parent was in here.
    pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, [] { get().mutex_.unlock(); });
#endif
  }

  KeptBlock *take_free(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // the last one that was freed: its end may still be in the cache
    for (auto i = free_.rbegin(); i != free_.rend(); ++i)
      if ((*i)->bytes == bytes) {
        KeptBlock *const found = *i;
        free_.erase(std::next(i).base());
        kept_ -= bytes;
        return found;
      }
    return nullptr;
  }

  // Gives the oldest blocks to the system until at most `most` bytes are kept.
  void drop(int64_t most) {
    std::list<KeptBlock *> gone;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (kept_ > most && !free_.empty()) {
        kept_ -= free_.front()->bytes;
        gone.splice(gone.end(), free_, free_.begin());
      }
    }
    for (KeptBlock *block : gone)
      unmap(block);
  }

  std::mutex mutex_;
  std::list<KeptBlock *> free_; // the oldest first
  int64_t in_use_ = 0, kept_ = 0, most_used_ = 0;
  std::atomic<int64_t> limit_{int64_t(1) << 30};
};

// kept_memory(limit): sets the limit where it is 0 or more; [limit, bytes in use, bytes kept].
std::vector<int64_t> kept_memory(int64_t limit) {
  if (limit >= 0)
    Store::get().set_limit(limit);
  return Store::get().sizes();
}

} // namespace

KeptBlock *take_kept(int64_t bytes) { return Store::get().take(bytes); }
void *kept_data(const KeptBlock *block) { return block->data; }
void give_back(KeptBlock *block) noexcept {
  if (--block->holders == 0)
    Store::get().give_back(block);
}
bool is_held_twice(const KeptBlock *block) { return block->holders == 2; }
bool keeps_memory() { return Store::get().limit() > 0; }

STABLE_TORCH_LIBRARY_FRAGMENT(iin_fast, m) { m.def("kept_memory(int limit) -> int[]"); }

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CompositeExplicitAutograd, m) { m.impl("kept_memory", TORCH_BOX(&kept_memory)); }

} // namespace iin_fast
