// In-place scaling of a stored gradient by the incoming one: the whole backward of every native op.
#pragma once

#include "types.h"

// data: (rows, columns) contiguous; row r is multiplied by factor * (per_row ? per_row[r * stride] : 1).
struct GiveGradientArgs {
  void* data;
  DType dtype;
  int64_t rows, columns;
  float factor;
  const float* per_row;
  int64_t per_row_stride;
};

KDK_AT_EVERY_LEVEL(void give_gradient_rows(const GiveGradientArgs& args, int64_t begin, int64_t end);)
