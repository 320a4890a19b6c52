#include "kd_cross_entropy.h"

#include <cmath>

#include "level.h"
#include "ops.h"
#include "parallel.h"

// The row kernel alone: labels are checked, and losses added up, by a caller that goes chunk by chunk.
void kd_cross_entropy_chunk(const KdCrossEntropyArgs& args, int threads) {
  const auto rows = KDK_AT_LEVEL(kd_cross_entropy_rows);
  parallel_rows(args.rows, threads, kd_cross_entropy_scratch(args.classes), kFlushDenormals,
                [&](int64_t begin, int64_t end, float* scratch) { rows(args, begin, end, scratch); });
}

// The op: label check, count of the rows that matter, row kernel in parallel, reduction in row order.
// reduced: 6 floats: loss (mean or sum), hard, soft, entropy (means over counted rows), hits, counted rows.
// post_scale: what backward multiplies by besides the incoming gradient.
// Returns the first row with a label out of range, -1 if there is none; then nothing was computed.
int64_t kd_cross_entropy(KdCrossEntropyArgs args, bool mean, float* reduced, float* post_scale, int threads) {
  int64_t counted = args.rows;
  if (args.target != nullptr) {
    counted = 0;
    for (int64_t row = 0; row < args.rows; ++row) {
      const int64_t at = row * args.target_stride;
      const int64_t label = args.target_is_int64 ? static_cast<const int64_t*>(args.target)[at]
                                                 : static_cast<const int32_t*>(args.target)[at];
      if (label == args.ignore_index) continue;
      if (label < 0 || label >= args.classes) return row;
      ++counted;
    }
  }
  const double divisor = mean && counted > 0 ? static_cast<double>(counted) : 1.0;
  args.gradient_scale = static_cast<float>(1.0 / divisor);
  *post_scale = 1.0f;
  if (args.gradient != nullptr && args.student.dtype == kFloat16) {
    // float16 would flush a soft gradient / n to zero. Stored without 1/n and as large as its bound allows, it
    // survives; the power of two costs no rounding.
    const double bound = 1.0 + std::fabs(args.alpha) / args.temperature;
    const double power = std::exp2(std::floor(std::log2(32768.0 / bound)));
    args.gradient_scale = static_cast<float>(power);
    *post_scale = static_cast<float>(1.0 / (power * divisor));
  }
  args.stream = args.student.dtype == kFloat32 && args.rows * args.classes * 4 >= kStreamBytes;
  args.gradient_stride = args.classes;
  kd_cross_entropy_chunk(args, threads);

  double loss = 0, hard = 0, soft = 0, entropy = 0, hits = 0;
  for (int64_t row = 0; row < args.rows; ++row) {
    loss += args.loss[row];
    hard += args.terms[row].hard;
    soft += args.terms[row].soft;
    entropy += args.terms[row].entropy;
    hits += args.terms[row].hit;
  }
  const double n = counted > 0 ? static_cast<double>(counted) : 1.0;
  reduced[0] = static_cast<float>(loss / divisor);
  reduced[1] = static_cast<float>(hard / n);
  reduced[2] = static_cast<float>(soft / n);
  reduced[3] = static_cast<float>(entropy / n);
  reduced[4] = static_cast<float>(hits);
  reduced[5] = static_cast<float>(counted);
  return -1;
}
