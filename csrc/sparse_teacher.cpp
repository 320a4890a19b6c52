#include "sparse_teacher.h"

#include "level.h"
#include "ops.h"
#include "parallel.h"

// The sums of every row where statistics are wanted, else the gradient in the place of the logits.
void sparse_teacher_tail(const SparseTeacherArgs& args, int threads) {
  const auto rows = args.statistics ? KDK_AT_LEVEL(sparse_teacher_statistics) : KDK_AT_LEVEL(sparse_teacher_gradient);
  parallel_rows(args.rows, threads, kSparseTeacherBlock, kFlushDenormals,
                [&](int64_t begin, int64_t end, float* scratch) { rows(args, begin, end, scratch); });
}
