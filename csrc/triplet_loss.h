// Arguments of the explicit triplet hinge; the formula is kdkernels/triplet/eager.py.
#pragma once

#include "types.h"

struct TripletArgs {
  Matrix anchor, positive, negative;  // (rows, features)
  int64_t rows, features;
  double margin;
  float eps;              // added to every component of both differences, as torch.nn.TripletMarginLoss does
  bool squared;           // d = ||.||^2, else ||.||
  bool active_at_zero;    // whether a hinge of exactly 0 has the gradient of an active one (torch's clamp_min)
  float gradient_scale;   // 1/n of a mean, or the power of two that float16 is stored with
  float* loss;            // (rows,)
  float* largest;         // (rows,) largest gradient component without gradient_scale; null: write the gradients
  void* gradient_anchor;  // (rows, features) contiguous in the member's dtype, null: not wanted
  void* gradient_positive;
  void* gradient_negative;
};

KDK_AT_EVERY_LEVEL(void triplet_rows(const TripletArgs& args, int64_t begin, int64_t end, float* scratch);)

// Floats of scratch that one thread needs: three staged rows and three rows of gradient.
static inline constexpr int64_t triplet_scratch(int64_t features) { return 6 * ((features + 63) / 64 * 64); }
