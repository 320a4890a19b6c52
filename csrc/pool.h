// Memory for large gradients that survives from step to step.
//
// A gradient of many megabytes is given back to the system when it is freed and comes back as fresh pages, whose faults
// cost more than the kernel that fills them (256 x 10,575 float32: 7 ms with, 3 ms without). Freed buffers are cached
// here instead, and given out again to requests of about their size.
#pragma once

#include <cstddef>

namespace pool {

struct Buffer {
  void* data;
  size_t bytes;
};

// At least `bytes`, aligned to a huge page; throws std::bad_alloc.
Buffer take(size_t bytes);
void give_back(Buffer buffer);
// Frees what is idle and returns how many bytes that were.
size_t empty();
// Bytes that lie idle.
size_t idle();

}  // namespace pool
