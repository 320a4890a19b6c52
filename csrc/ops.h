// The launchers that module.cpp binds: checked sizes in, raw pointers, no torch.
#pragma once

#include "give_gradient.h"
#include "kd_cross_entropy.h"

int64_t kd_cross_entropy(KdCrossEntropyArgs args, bool mean, float* reduced, float* post_scale, int threads);
void give_gradient(const GiveGradientArgs& args, int threads);
