#include "give_gradient.h"

#include "level.h"
#include "ops.h"
#include "parallel.h"

void give_gradient(const GiveGradientArgs& args, int threads) {
  if (args.per_row == nullptr && args.factor == 1.0f) return;
  const int64_t elements = args.rows * args.columns;
  if (elements < 65536) threads = 1;
  const auto rows = KDK_AT_LEVEL(give_gradient_rows);
  parallel_rows(elements, threads, 0, kFlushResults,
                [&](int64_t begin, int64_t end, float*) { rows(args, begin, end); });
}
