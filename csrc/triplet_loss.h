// Arguments of the explicit triplet hinge; the formula is kdkernels/triplet_loss/eager.py.
#pragma once

#include "types.h"

struct TripletArgs {
  Matrix anchor, positive, negative;  // (rows, features)
  int64_t rows, features;
  double margin;
  float eps;              // added to every component of both differences, as torch.nn.TripletMarginLoss does
  bool squared;           // d = ||.||^2, else ||.||
  bool active_at_zero;    // whether a hinge of exactly 0 has the gradient of an active one (torch's clamp_min)
  float gradient_scale;   // 1/n of a mean
  float powers[3];        // of two, that the gradients of anchor, positive and negative are stored times
  float* loss;            // (rows,)
  float* largest;         // (rows, 3) largest component of each gradient without its power; null: write the gradients
  void* gradient_anchor;  // (rows, features) contiguous in the member's dtype, null: not wanted
  void* gradient_positive;
  void* gradient_negative;
};

KDK_AT_EVERY_LEVEL(void triplet_rows(const TripletArgs& args, int64_t begin, int64_t end, float* scratch);)

// Floats of scratch that one thread needs: three staged rows and three rows of gradient.
static inline constexpr int64_t triplet_scratch(int64_t features) { return 6 * ((features + 63) / 64 * 64); }
