// Arguments of the fused row kernel; the formula is kdkernels/kd_cross_entropy/eager.py, the derivation docs/ops.md.
#pragma once

#include "types.h"

// Per-row values that return_terms reports.
struct RowTerms {
  float hard, soft, entropy, hit;
};

// A margin at a row's label in the hard term: the logit s_y becomes s_y + added, and the gradient of that is
// multiplied by `slope` on its way to s_y.
struct RowMargin {
  float added, slope;
};

struct KdCrossEntropyArgs {
  Matrix student;
  Matrix teacher;      // data null: plain cross-entropy
  const void* target;  // int64 or int32 labels, null: the soft term alone
  bool target_is_int64;
  int64_t target_stride;
  int64_t rows, classes;
  float temperature, alpha;  // alpha already holds tau^2 where that is set
  float label_smoothing;
  int64_t ignore_index;
  float gradient_scale;     // 1/n of a mean, or the power of two that float16 is stored with
  float* loss;              // (rows,)
  RowTerms* terms;          // (rows,)
  bool stream;              // store a float32 gradient past the caches
  void* gradient;           // (rows, classes) in the student's dtype, null: loss alone. May be the student itself: a
                            // row is read to its end before its gradient is written
  int64_t gradient_stride;  // from row to row, in elements
  const RowMargin* margin;  // (rows,) or null
};

KDK_AT_EVERY_LEVEL(void kd_cross_entropy_rows(const KdCrossEntropyArgs& args, int64_t begin, int64_t end,
                                              float* scratch);)

constexpr int64_t kBlock = 2048;  // 8 KB of each network's logits: a block pair stays in L1 between its two readings

// Floats of scratch that one thread needs for rows of `classes`.
static inline constexpr int64_t kd_cross_entropy_scratch(int64_t classes) {
  const int64_t padded = (classes + kBlock - 1) / kBlock * kBlock;
  return 3 * padded + 3 * kBlock + 2 * (padded / kBlock) + 64;
}
