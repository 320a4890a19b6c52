#include "kd_tail.h"

#include "level.h"
#include "ops.h"
#include "parallel.h"

// The sums of every row where statistics are asked for, else the gradient in the place of the logits.
void kd_tail(const KdTailArgs& args, int threads) {
  const auto rows = args.statistics ? KDK_AT_LEVEL(kd_tail_statistics) : KDK_AT_LEVEL(kd_tail_gradient);
  parallel_rows(args.rows, threads, kTailBlock,
                [&](int64_t begin, int64_t end, float* scratch) { rows(args, begin, end, scratch); });
}
