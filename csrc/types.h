// Plain types that launchers and row kernels exchange: no functions, so safe to share across instruction-set levels.
#pragma once

#include <cstdint>

// Gradients of one call from which on none would wait in a cache for backward: they are streamed past it.
constexpr int64_t kStreamBytes = 8 << 20;

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A matrix of any dtype, strides in elements.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t stride_row;
  int64_t stride_col;
};

// Declares row kernels, which are compiled once per instruction-set level, in the namespace of each level.
#define KDK_AT_EVERY_LEVEL(...) \
  namespace v4 {                \
  __VA_ARGS__                   \
  }                             \
  namespace v3 {                \
  __VA_ARGS__                   \
  }                             \
  namespace base {              \
  __VA_ARGS__                   \
  }

// Compiled only where the level is: KDK_HAVE_* come from setup.py.
#if defined(KDK_HAVE_V4)
#define KDK_IF_V4(x) x
#else
#define KDK_IF_V4(x)
#endif
#if defined(KDK_HAVE_V3)
#define KDK_IF_V3(x) x
#else
#define KDK_IF_V3(x)
#endif
