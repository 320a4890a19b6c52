// The instruction-set level that kernels run at, chosen once at load and lowered by KDKERNELS_ISA or set_level().
#pragma once

#include "types.h"

enum Level : int { kBaseLevel = 0, kV3Level = 1, kV4Level = 2 };

// Highest level that was compiled in and that this processor has.
Level highest_level();
Level current_level();
// False where the level was left out or the processor lacks it.
bool set_level(Level level);

// The current level's copy of a row kernel.
#define KDK_AT_LEVEL(function)                                                                                     \
  (KDK_IF_V4(current_level() >= kV4Level ? v4::function :) KDK_IF_V3(current_level() >= kV3Level ? v3::function :) \
       base::function)
