// The launchers that module.cpp binds: checked sizes in, raw pointers, no torch.
#pragma once

#include <vector>

#include "batch_triplet_loss.h"
#include "give_gradient.h"
#include "hidden_l2.h"
#include "kd_cross_entropy.h"
#include "nearest_neighbor.h"
#include "sparse_teacher.h"
#include "triplet_loss.h"

int64_t kd_cross_entropy(KdCrossEntropyArgs args, bool mean, float* reduced, float* post_scale, int threads);
void kd_cross_entropy_chunk(const KdCrossEntropyArgs& args, int threads);
void sparse_teacher_tail(const SparseTeacherArgs& args, int threads);
void give_gradient(const GiveGradientArgs& args, int threads);
void triplet_loss(TripletArgs args, bool mean, float* reduced, float* post_scale, int threads);
bool batch_triplet_center(const CenterArgs& args, int threads);
AnchorTotals batch_triplet_mine(MineArgs args, const Labels& labels, float* loss, int threads);
bool batch_triplet_spread(SpreadArgs args, bool finite, int threads);
void hidden_l2(const std::vector<HiddenL2Input>& inputs, float* loss, float* terms, float* post_scale, int threads);
void hidden_l2_give(const std::vector<HiddenL2Given>& gradients, int threads);
void nearest_begin(Nearest* nearest, int64_t rows);
void nearest_center(const RowRange& gallery, float* center, int threads);
void nearest_norms(const RowRange& range, const float* center, float* norms, int threads);
void nearest_stage(const StageArgs& args, int threads);
void nearest_scan(ScanArgs args, const float* gallery_norms, int threads);
void nearest_finish(const Nearest* nearest, int64_t first, int64_t rows, bool leave_one_out, float* distance,
                    int64_t* index);
