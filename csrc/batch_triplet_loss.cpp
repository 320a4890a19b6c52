#include "batch_triplet_loss.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "level.h"
#include "ops.h"
#include "parallel.h"

namespace {

constexpr int64_t kSmall = 32768;  // elements below which a second thread costs more than it takes over

int64_t label_at(const Labels& labels, int64_t row) {
  return labels.is_int64 ? static_cast<const int64_t*>(labels.data)[row * labels.stride]
                         : static_cast<const int32_t*>(labels.data)[row * labels.stride];
}

// Rows by identity: dense identity numbers, and the rows of each identity in ascending order.
struct Identities {
  std::vector<int32_t> group, order, starts;

  Identities(const Labels& labels, int64_t rows) : group(rows), order(rows) {
    std::vector<int64_t> values(rows);
    for (int64_t row = 0; row < rows; ++row) values[row] = label_at(labels, row);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return values[a] < values[b]; });
    for (int64_t at = 0; at < rows; ++at) {
      if (at == 0 || values[order[at]] != values[order[at - 1]]) starts.push_back(static_cast<int32_t>(at));
      group[order[at]] = static_cast<int32_t>(starts.size()) - 1;
    }
    starts.push_back(static_cast<int32_t>(rows));
  }
};

}  // namespace

// Shift, centered rows and squared norms. Returns whether all of them are finite.
bool batch_triplet_center(const CenterArgs& args, int threads) {
  if (args.rows * args.features < kSmall) threads = 1;
  const int64_t features = pad_up(args.features), blocks = (args.features + 63) / 64;
  std::fill(args.shift + args.features, args.shift + features, 0.0f);
  const auto columns = KDK_AT_LEVEL(center_columns);
  parallel_rows(blocks, threads, 0, kKeepDenormals, [&](int64_t begin, int64_t end, float*) {
    columns(args, begin * 64, std::min(end * 64, args.features));
  });
  const auto rows = KDK_AT_LEVEL(center_rows);
  parallel_rows(pad_up(args.rows), threads, 0, kKeepDenormals,
                [&](int64_t begin, int64_t end, float*) { rows(args, begin, end); });
  return std::all_of(args.norms, args.norms + args.rows, [](float norm) { return std::isfinite(norm); });
}

// One anchor a row; `loss` (rows,) is the sum over its triplets. Returns the totals over all anchors, in row order.
AnchorTotals batch_triplet_mine(MineArgs args, const Labels& labels, float* loss, int threads) {
  const Identities identities(labels, args.rows);
  std::vector<AnchorTotals> totals(args.rows);
  args.group = identities.group.data();
  args.order = identities.order.data();
  args.starts = identities.starts.data();
  args.totals = totals.data();
  if (args.rows * args.rows < kSmall) threads = 1;
  const auto rows = KDK_AT_LEVEL(mine_rows);
  parallel_rows(pad_up(args.rows), threads, mine_scratch(args.rows), kKeepDenormals,
                [&](int64_t begin, int64_t end, float* scratch) { rows(args, begin, end, scratch); });
  AnchorTotals all{0.0, 0, 0};
  for (int64_t row = 0; row < args.rows; ++row) {
    loss[row] = static_cast<float>(totals[row].loss);
    all.loss += totals[row].loss;
    all.triplets += totals[row].triplets;
    all.active += totals[row].active;
  }
  return all;
}

// S and the part of the gradient that is not - S X. Returns whether that product is still to be added: few pairs, or
// values that are not finite (0 * inf), are done completely here.
bool batch_triplet_spread(SpreadArgs args, bool finite, int threads) {
  if (args.rows * args.rows < kSmall) threads = 1;
  const int64_t tasks = tile_tasks(args.rows);
  std::vector<int64_t> nonzeros(tasks);
  args.nonzeros = nonzeros.data();
  const auto tiles = KDK_AT_LEVEL(spread_tiles);
  parallel_rows(tasks, threads, 0, kKeepDenormals,
                [&](int64_t begin, int64_t end, float*) { tiles(args, begin, end); });
  const int64_t pairs = std::accumulate(nonzeros.begin(), nonzeros.end(), int64_t{0});
  // A pair by its difference costs about 4 of the GEMM's pairs.
  args.by_pairs = !finite || pairs <= args.rows * args.rows / 4;
  const auto rows = KDK_AT_LEVEL(spread_rows);
  parallel_rows(pad_up(args.rows), threads, spread_scratch(args.rows), kKeepDenormals,
                [&](int64_t begin, int64_t end, float* scratch) { rows(args, begin, end, scratch); });
  return !args.by_pairs;
}
