// Arguments of in-batch mining; the formulas are kdkernels/triplet/eager.py.
//
// Four steps, the GEMMs between them run by the caller: center the embeddings; Gram matrix G; mine, which turns row a
// of G into anchor a's coefficients W_a; spread, which turns W into S = weights W + (weights W)^T and starts the
// gradient sum_j S_ij (x_i - x_j) with all but its product - S X.
#pragma once

#include "types.h"

// Square matrices and centered rows are padded to whole blocks: BLAS then gives identical bits at any number of
// threads, and no row kernel has a tail.
constexpr int64_t kPad = 16;
static inline constexpr int64_t pad_up(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

struct CenterArgs {
  Matrix embeddings;  // (rows, features)
  int64_t rows, features;
  float* staged;    // (rows, padded features) float32 copy, null where embeddings can be read as they are
  float* shift;     // (padded features,) the column means
  float* centered;  // (padded rows, padded features)
  float* norms;     // (padded rows,) squared norms of centered
};

// (rows,) int32 or int64
struct Labels {
  const void* data;
  bool is_int64;
  int64_t stride;
};

enum Mining : int32_t { kHard = 0, kSemihard = 1, kAll = 2 };

struct AnchorTotals {
  double loss;
  int64_t triplets, active;
};

struct MineArgs {
  const float* embeddings;  // (rows, padded features) as given: their differences have no shift's rounding
  int64_t stride;
  int64_t rows, features;  // features: the padded number
  const float* norms;      // (padded rows,)
  float* matrix;           // (padded rows, padded rows) G, then W where want_gradient
  uint64_t* close;         // (rows, words) pairs too close for the Gram form; null without gradient
  const int32_t* group;    // (rows,) dense identity number
  const int32_t* order;    // (rows,) rows by identity, ascending inside one
  const int32_t* starts;   // (identities + 1,) where each identity begins in `order`
  Mining mining;
  bool squared, want_gradient;
  double margin;
  AnchorTotals* totals;  // (rows,)
};

struct SpreadArgs {
  const float* embeddings;  // as in MineArgs
  int64_t stride;
  int64_t rows, features;
  const float* centered;      // (padded rows, features)
  const float* coefficients;  // (padded rows, padded rows) W
  float* sums;                // the same size, S; may be W itself
  const uint64_t* close;
  const float* weights;  // (rows,) one per anchor, null: `factor` for all
  float factor;
  bool by_pairs;      // every pair by its difference, no GEMM
  int64_t* nonzeros;  // (tiles,) of S in each tile row pair
  float* gradient;    // (padded rows, features)
};

static inline constexpr int64_t close_words(int64_t rows) { return (rows + 63) / 64; }
static inline constexpr int64_t tile_tasks(int64_t rows) { return (pad_up(rows) / kPad + 1) / 2; }
static inline constexpr int64_t mine_scratch(int64_t rows) { return 7 * pad_up(rows) + 2; }
static inline constexpr int64_t spread_scratch(int64_t rows) { return 2 * pad_up(rows); }

#define KDK_BATCH_TRIPLET                                                           \
  void center_columns(const CenterArgs& args, int64_t begin, int64_t end);          \
  void center_rows(const CenterArgs& args, int64_t begin, int64_t end);             \
  void mine_rows(const MineArgs& args, int64_t begin, int64_t end, float* scratch); \
  void spread_tiles(const SpreadArgs& args, int64_t begin, int64_t end);            \
  void spread_rows(const SpreadArgs& args, int64_t begin, int64_t end, float* scratch);

KDK_AT_EVERY_LEVEL(KDK_BATCH_TRIPLET)
#undef KDK_BATCH_TRIPLET
