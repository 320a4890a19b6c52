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
  if (!(largest > 0.0)) return 1.0;
  return std::exp2(std::fmin(100.0, std::fmax(-100.0, std::floor(std::log2(32768.0 / largest)))));
}

}  // namespace

// The op: row kernel in parallel, reduction in row order.
// reduced: the mean (0 of no rows) or sum of the losses. post_scale: 3 factors, of the gradients of anchor, positive
// and negative, that backward multiplies by besides the incoming gradient.
void triplet_loss(TripletArgs args, bool mean, float* reduced, float* post_scale, int threads) {
  const double divisor = mean && args.rows > 0 ? static_cast<double>(args.rows) : 1.0;
  if (args.rows * args.features < 16384) threads = 1;
  const auto rows = KDK_AT_LEVEL(triplet_rows);
  const auto run = [&](const TripletArgs& these) {
    parallel_rows(these.rows, threads, triplet_scratch(these.features), kKeepDenormals,
                  [&](int64_t begin, int64_t end, float* scratch) { rows(these, begin, end, scratch); });
  };
  args.largest = nullptr;
  args.gradient_scale = static_cast<float>(1.0 / divisor);
  for (int member = 0; member < 3; ++member) args.powers[member] = post_scale[member] = 1.0f;
  // Each member that is stored in float16 has a power of its own: a gradient of another member or dtype does not
  // decide about it.
  const bool half[3] = {args.gradient_anchor && args.anchor.dtype == kFloat16,
                        args.gradient_positive && args.positive.dtype == kFloat16,
                        args.gradient_negative && args.negative.dtype == kFloat16};
  if (half[0] || half[1] || half[2]) {
    std::vector<float> largest(3 * args.rows);
    TripletArgs measure = args;
    measure.largest = largest.data();
    run(measure);
    for (int member = 0; member < 3; ++member) {
      if (!half[member]) continue;
      float most = 0.0f;
      for (int64_t row = 0; row < args.rows; ++row) most = std::fmax(most, largest[3 * row + member]);
      const double power = power_for_half(most);
      args.powers[member] = static_cast<float>(power);
      post_scale[member] = static_cast<float>(1.0 / power);
    }
  }
  run(args);
  double total = 0;
  for (int64_t row = 0; row < args.rows; ++row) total += args.loss[row];
  *reduced = static_cast<float>(total / divisor);
}
