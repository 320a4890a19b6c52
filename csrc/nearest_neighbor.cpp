#include "nearest_neighbor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "level.h"
#include "ops.h"
#include "parallel.h"

namespace {

constexpr int64_t kSampleRows = 256;  // of the gallery: enough to take the distance to the origin away
constexpr int64_t kSmall = 16384;     // elements below which a second thread costs more than it brings

int threads_for(int64_t elements, int threads) { return elements < kSmall ? 1 : threads; }

}  // namespace

// The point that is taken off every row: the mean of some gallery rows, evenly spread.
void nearest_center(const RowRange& gallery, float* center, int threads) {
  const int64_t step = (gallery.rows + kSampleRows - 1) / kSampleRows;
  const auto kernel = KDK_AT_LEVEL(nearest_center_columns);
  parallel_rows(gallery.columns, threads_for(gallery.columns * kSampleRows, threads), 0, kKeepDenormals,
                [&](int64_t begin, int64_t end, float*) { kernel(gallery, step, center, begin, end); });
}

void nearest_norms(const RowRange& range, const float* center, float* norms, int threads) {
  const auto kernel = KDK_AT_LEVEL(nearest_norm_rows);
  parallel_rows(range.rows, threads_for(range.rows * range.columns, threads), 0, kKeepDenormals,
                [&](int64_t begin, int64_t end, float*) { kernel(range, center, norms, begin, end); });
}

void nearest_stage(const StageArgs& args, int threads) {
  const auto kernel = KDK_AT_LEVEL(nearest_stage_rows);
  parallel_rows(args.range.rows, threads_for(args.range.rows * args.width, threads), 0, kKeepDenormals,
                [&](int64_t begin, int64_t end, float*) { kernel(args, begin, end); });
}

// Brings `nearest` up to date with one tile. gallery_norms: ||x'||^2 of its gallery rows.
void nearest_scan(ScanArgs args, const float* gallery_norms, int threads) {
  std::vector<float> bounds(args.gallery.rows);
  std::vector<int64_t> unsafe;
  for (int64_t row = 0; row < args.gallery.rows; ++row) {
    const float norm = gallery_norms[row];
    const bool safe = norm <= kSafeNorm;
    bounds[row] = safe ? static_cast<float>((1.0 - args.relative_error) * static_cast<double>(norm))
                       : std::numeric_limits<float>::infinity();
    if (!safe && !std::isnan(norm)) unsafe.push_back(row);
  }
  args.gallery_bounds = bounds.data();
  args.unsafe = unsafe.data();
  args.unsafe_count = static_cast<int64_t>(unsafe.size());
  const auto kernel = KDK_AT_LEVEL(nearest_scan_rows);
  parallel_rows(args.queries.rows, threads_for(args.queries.rows * args.gallery.rows, threads), 0, kKeepDenormals,
                [&](int64_t begin, int64_t end, float*) { kernel(args, begin, end); });
}

// Distances and indices as they are returned; NaN and the lowest index that is not the query's own where none was
// found.
void nearest_finish(const Nearest* nearest, int64_t first, int64_t rows, bool leave_one_out, float* distance,
                    int64_t* index) {
  for (int64_t row = 0; row < rows; ++row) {
    const bool found = nearest[row].index >= 0;
    distance[row] = found ? static_cast<float>(nearest[row].distance) : std::numeric_limits<float>::quiet_NaN();
    index[row] = found ? nearest[row].index : (leave_one_out && first + row == 0 ? 1 : 0);
  }
}

void nearest_begin(Nearest* nearest, int64_t rows) {
  std::fill(nearest, nearest + rows, Nearest{std::numeric_limits<double>::infinity(), -1});
}
