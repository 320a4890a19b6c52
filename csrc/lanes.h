// Lanes of a vector one by one: which of them a comparison holds for, and their sum. Internal linkage, see simd.h.
#pragma once

#include "simd.h"

namespace {

// One bit per lane of a comparison.
inline uint32_t lanes(VecInt mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= (mask[i] ? 1u : 0u) << i;
  return bits;
#endif
}

inline int lowest_bit(uint64_t bits) { return __builtin_ctzll(bits); }

// Lanes added in pairs: fewer roundings in a row than reduce_add, and a shorter chain.
inline float sum_lanes(Vec v) {
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

}  // namespace
