// Sweeps of a chunk of logits from which some classes were taken out (they are -inf): what a sparse teacher needs. The
// formulas are kdkernels/linear_kd_cross_entropy/sparse_teacher.py, the derivation docs/ops.md.
#pragma once

#include "types.h"

// One row's sums, relative to its maximum, which is finite where no logit is: then both sums are 0.
struct TailStatistics {
  float max, plain, softened;  // m, sum_c exp(s_c - m), sum_c exp((s_c - m) / tau)
};

// A row's gradient plain exp(s_c - m) + softened exp((s_c - m) / tau) - less.
struct TailFactors {
  float max, plain, softened, less;
};

struct SparseTeacherArgs {
  float* logits;  // (rows, classes); the gradient takes their place
  int64_t stride, rows, classes;
  float temperature;
  TailStatistics* statistics;  // (rows,) or null
  const TailFactors* factors;  // (rows,) or null
};

KDK_AT_EVERY_LEVEL(void sparse_teacher_statistics(const SparseTeacherArgs& args, int64_t begin, int64_t end,
                                                  float* scratch);
                   void sparse_teacher_gradient(const SparseTeacherArgs& args, int64_t begin, int64_t end,
                                                float* scratch);)

constexpr int64_t kSparseTeacherBlock = 2048;  // 8 KB: a block stays in L1 between its two readings
