// The parts of nearest_neighbor around its matrix products; the formula is kdkernels/nearest_neighbor/eager.py.
//
// With a center c taken off every row, q' = q - c and x' = x - c,
//     ||q - x||^2 = ||q'||^2 + ||x'||^2 - 2 q'.x'
// whose right side a tile of a matrix product yields fast and inexactly: it is off by at most
// e (||q'||^2 + ||x'||^2) + f, e and f from the number of columns (op.py). So the right side minus that is a lower
// bound; rows whose bound is above a distance already found are passed over, all others are measured in difference
// form.
#pragma once

#include "types.h"

constexpr float kSafeNorm = 1e37f;  // squared norms up to here cannot overflow a product; others are always measured

// Rows [first, first + rows) of a matrix, `columns` wide.
struct RowRange {
  Matrix matrix;
  int64_t first, rows, columns;
};

// Columns [column, column + width) of a row range, centered and times `factor`, as (rows, width) floats. A row whose
// squared norm is not at most kSafeNorm becomes zeros, so that the product holds no NaN.
struct StageArgs {
  RowRange range;
  int64_t column, width;
  const float* center;
  const float* norms;  // (rows,) of the range
  float factor;
  float* out;
};

// The nearest row of a query so far.
struct Nearest {
  double distance;  // +inf before anything was found
  int64_t index;    // -1 before anything was found
};

struct ScanArgs {
  RowRange queries, gallery;
  float* products;              // (queries, gallery) of -2 q'.x'; scratch, the query's own column is overwritten
  const float* query_norms;     // ||q'||^2
  const float* gallery_bounds;  // (1 - e) ||x'||^2, +inf for a row that is not safe
  const int64_t* unsafe;        // gallery rows of the tile that are not safe and hold no NaN
  int64_t unsafe_count;
  double relative_error, absolute_error;  // e and f
  bool leave_one_out;                     // query number i is gallery row number i
  Nearest* nearest;                       // (queries,)
};

#define KDK_NEAREST_NEIGHBOR_KERNELS                                                                            \
  void nearest_center_columns(const RowRange& sample, int64_t step, float* center, int64_t begin, int64_t end); \
  void nearest_norm_rows(const RowRange& range, const float* center, float* norms, int64_t begin, int64_t end); \
  void nearest_stage_rows(const StageArgs& args, int64_t begin, int64_t end);                                   \
  void nearest_scan_rows(const ScanArgs& args, int64_t begin, int64_t end);

KDK_AT_EVERY_LEVEL(KDK_NEAREST_NEIGHBOR_KERNELS)
#undef KDK_NEAREST_NEIGHBOR_KERNELS
