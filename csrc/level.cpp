#include "level.h"

namespace {

Level detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  KDK_IF_V4(if (v4) return kV4Level;)
  KDK_IF_V3(if (v3) return kV3Level;)
  (void)v3;
  (void)v4;
#endif
  return kBaseLevel;
}

Level& chosen() {
  static Level level = detect();
  return level;
}

}  // namespace

Level highest_level() {
  static const Level level = detect();
  return level;
}

Level current_level() { return chosen(); }

bool set_level(Level level) {
  if (level > highest_level()) return false;
#if !defined(KDK_HAVE_V3)
  if (level == kV3Level) return false;
#endif
  chosen() = level;
  return true;
}
