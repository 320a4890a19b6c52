#include "triplet_loss.h"

#include <cmath>
#include <vector>

#include "level.h"
#include "ops.h"
#include "parallel.h"

namespace {

// The power of two that brings gradients of at most `largest` to the upper end of float16's range. A mean's 1/n or a
// small difference would otherwise be flushed to zero; the power costs no rounding.
double power_for_half(double largest) {
  if (!(largest > 0.0) || std::isinf(largest)) return 1.0;
  return std::exp2(std::fmin(100.0, std::fmax(-100.0, std::floor(std::log2(32768.0 / largest)))));
}

}  // namespace

// The op: row kernel in parallel, reduction in row order.
// reduced: the mean (0 of no rows) or sum of the losses. post_scale: what backward multiplies by besides the incoming
// gradient.
void triplet_loss(TripletArgs args, bool mean, float* reduced, float* post_scale, int threads) {
  const double divisor = mean && args.rows > 0 ? static_cast<double>(args.rows) : 1.0;
  if (args.rows * args.features < 16384) threads = 1;
  const auto rows = KDK_AT_LEVEL(triplet_rows);
  const auto run = [&](const TripletArgs& these) {
    parallel_rows(these.rows, threads, triplet_scratch(these.features),
                  [&](int64_t begin, int64_t end, float* scratch) { rows(these, begin, end, scratch); });
  };
  args.largest = nullptr;
  args.gradient_scale = static_cast<float>(1.0 / divisor);
  *post_scale = 1.0f;
  const bool half = (args.gradient_anchor && args.anchor.dtype == kFloat16) ||
                    (args.gradient_positive && args.positive.dtype == kFloat16) ||
                    (args.gradient_negative && args.negative.dtype == kFloat16);
  if (half) {
    std::vector<float> largest(args.rows);
    TripletArgs measure = args;
    measure.largest = largest.data();
    run(measure);
    float most = 0.0f;
    for (const float value : largest) most = value > most ? value : most;
    const double power = power_for_half(most);
    args.gradient_scale = static_cast<float>(power);
    *post_scale = static_cast<float>(1.0 / (power * divisor));
  }
  run(args);
  double total = 0;
  for (int64_t row = 0; row < args.rows; ++row) total += args.loss[row];
  *reduced = static_cast<float>(total / divisor);
}
