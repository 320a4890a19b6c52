// Arguments of the fused squared-distance kernel; the formula is kdkernels/hidden_l2/eager.py.
#pragma once

#include "types.h"

constexpr int kMaxDims = 64;  // torch's own limit

// One tensor as Python hands it over: address, dtype, one stride (in elements) a dimension.
struct Strided {
  void* data;
  DType dtype;
  int64_t strides[kMaxDims];
};

// One pair S, T as the row kernel sweeps it. Dimensions stand in the order of the gradient's memory, outermost first,
// neighbors merged wherever both tensors allow it; so a pair of equal dense layouts is one dimension of stride 1, and
// the gradient of element number i lies at i.
struct HiddenL2Pair {
  const void* student;
  const void* teacher;
  void* gradient;  // null: none is wanted
  DType student_dtype, teacher_dtype;
  int dims;  // at least 1
  int64_t elements;
  int64_t sizes[kMaxDims], student_strides[kMaxDims], teacher_strides[kMaxDims];
  bool counts;        // false: its weight is 0, nothing is read and the gradient is 0
  bool stream;        // the gradient goes past the caches
  float coefficient;  // gradient = coefficient * (s - t)
};

// Sums of one chunk of a pair.
struct HiddenL2Partial {
  double sum;     // sum (s - t)^2
  float largest;  // largest finite |s - t|, for float16 gradients only
};

KDK_AT_EVERY_LEVEL(HiddenL2Partial hidden_l2_chunk(const HiddenL2Pair& pair, int64_t begin, int64_t end);)

// A pair as the launcher takes it, before dimensions are ordered and merged.
struct HiddenL2Input {
  Strided student, teacher, gradient;  // gradient.data null: none is wanted
  int dims;
  int64_t sizes[kMaxDims];
  double weight, scale;  // w_i and r_i
};

// A stored gradient to be multiplied by `factor` in place; its memory has no gaps.
struct HiddenL2Given {
  void* data;
  DType dtype;
  int64_t elements;
  float factor;
};
