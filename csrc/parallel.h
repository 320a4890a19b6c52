// Row-parallel loops with a choice about denormals, and per-thread scratch. Included by launchers only (baseline code).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

// Handling of numbers below 2^-126 in a loop; the values are MXCSR's bits. Logits spread over +-64 put most of a
// row's exponentials there, which costs 8x, so loops over exponentials flush them. Distances keep them: only the
// caller's own numbers can be so small.
enum Denormals : unsigned { kKeepDenormals = 0x0000u, kFlushResults = 0x8000u, kFlushDenormals = 0x8040u };

// The mode is per thread, so every worker sets it and restores what it found.
class DenormalMode {
 public:
#if defined(__SSE__)
  explicit DenormalMode(Denormals denormals) : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | denormals); }
  ~DenormalMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  explicit DenormalMode(Denormals) {}
#endif
};

// Memory that a worker thread keeps between calls: fresh pages would cost more than the kernel.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  float* get(int64_t floats) {
    if (floats > size_) {
      std::free(data_);
      size_ = 0;
      const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 4095) / 4096 * 4096;
      data_ = static_cast<float*>(std::aligned_alloc(4096, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = static_cast<int64_t>(bytes / sizeof(float));
    }
    return data_;
  }

  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

// Calls body(begin, end, scratch) on contiguous shares of [0, count). Shares depend on `threads` alone.
// `scratch_floats` are allocated before the parallel region's work, and a failed allocation is thrown to the caller,
// not into OpenMP.
template <typename Body>
void parallel_rows(int64_t count, int threads, int64_t scratch_floats, Denormals denormals, const Body& body) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads < 1) threads = 1;
  bool failed = false;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    int me = 0, team = 1;
#if defined(_OPENMP)
    me = omp_get_thread_num();
    team = omp_get_num_threads();
#endif
    const DenormalMode guard(denormals);
    float* scratch = nullptr;
    try {
      scratch = scratch_floats > 0 ? Scratch::mine().get(scratch_floats) : nullptr;
      body(count * me / team, count * (me + 1) / team, scratch);
    } catch (const std::bad_alloc&) {
#if defined(_OPENMP)
#pragma omp atomic write
#endif
      failed = true;
    }
    (void)guard;
  }
  if (failed) throw std::bad_alloc();
}

}  // namespace
