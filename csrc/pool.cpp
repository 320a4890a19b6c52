#include "pool.h"

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pool {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMostIdle = size_t{1} << 30;

struct Idle {
  std::mutex mutex;
  std::list<Buffer> buffers;  // most recently used first
  size_t bytes = 0;
};

// Never destroyed: tensors may be freed after static destructors have run.
Idle& idle_buffers() {
  static Idle* idle = new Idle;
  return *idle;
}

size_t empty_locked(Idle& idle, size_t most) {
  size_t freed = 0;
  while (idle.bytes > most) {
    const Buffer oldest = idle.buffers.back();
    idle.buffers.pop_back();
    idle.bytes -= oldest.bytes;
    freed += oldest.bytes;
    std::free(oldest.data);
  }
  return freed;
}

}  // namespace

Buffer take(size_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  {
    Idle& idle = idle_buffers();
    const std::lock_guard<std::mutex> lock(idle.mutex);
    for (auto it = idle.buffers.begin(); it != idle.buffers.end(); ++it) {
      if (it->bytes >= bytes && it->bytes <= bytes + bytes / 4) {
        const Buffer found = *it;
        idle.buffers.erase(it);
        idle.bytes -= found.bytes;
        return found;
      }
    }
  }
  void* data = std::aligned_alloc(kHugePage, bytes);
  if (data == nullptr) {
    empty();
    data = std::aligned_alloc(kHugePage, bytes);
  }
  if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  (void)madvise(data, bytes, MADV_HUGEPAGE);  // a hint: where it is refused, small pages do
#endif
  return Buffer{data, bytes};
}

void give_back(Buffer buffer) {
  Idle& idle = idle_buffers();
  const std::lock_guard<std::mutex> lock(idle.mutex);
  idle.buffers.push_front(buffer);
  idle.bytes += buffer.bytes;
  empty_locked(idle, kMostIdle);
}

size_t empty() {
  Idle& idle = idle_buffers();
  const std::lock_guard<std::mutex> lock(idle.mutex);
  return empty_locked(idle, 0);
}

size_t idle() {
  Idle& idle = idle_buffers();
  const std::lock_guard<std::mutex> lock(idle.mutex);
  return idle.bytes;
}

}  // namespace pool
