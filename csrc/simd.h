// Shared by all row kernels: vectors of the level's width, exp, 16-bit conversions, staged blocks.
//
// A file <op>.inc is compiled once per level (x86-64-v4, v3, baseline; plain elsewhere), so everything here has
// internal linkage: an inline function with external linkage would be merged by the linker across levels, and a
// machine without AVX-512 could then run the AVX-512 copy. For the same reason no std:: template is used.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "types.h"

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t VecInt __attribute__((vector_size(kWidth * 4)));
typedef float VecUnaligned __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLowest = -3.402823466e38f;

inline Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
// A store past the caches: the line is not read first, and nothing that is still needed is pushed out.
#if defined(__AVX512F__)
inline void stream(float* p, Vec v) { _mm512_stream_ps(p, (__m512)v); }
inline void stream_fence() { _mm_sfence(); }
#elif defined(__AVX2__)
inline void stream(float* p, Vec v) { _mm256_stream_ps(p, (__m256)v); }
inline void stream_fence() { _mm_sfence(); }
#else
inline void stream(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline void stream_fence() {}
#endif

inline Vec splat(float x) { return Vec{} + x; }

// NaN in `a` yields `b`: a NaN never becomes the maximum, it surfaces in the exponentials instead.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

inline float reduce_add(Vec v) {
  float total = 0.0f;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

inline float reduce_max(Vec v) {
  float best = v[0];
  for (int i = 1; i < kWidth; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

inline float reduce_min(Vec v) {
  float best = v[0];
  for (int i = 1; i < kWidth; ++i) best = v[i] < best ? v[i] : best;
  return best;
}

// Maximum of whole vectors, kLowest where none is above it.
inline float block_max(const float* __restrict__ p, int64_t count) {
  Vec best = splat(kLowest), second = best;
  int64_t i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    best = max(load(p + i), best);
    second = max(load(p + i + kWidth), second);
  }
  for (; i < count; i += kWidth) best = max(load(p + i), best);
  return reduce_max(max(best, second));
}

// 2^x for x below 127: degree-5 minimax polynomials with 2^0 = 1 exactly, relative error at most 2e-7. -inf gives 0,
// results below 2^-126 give 0 (flush-to-zero is on), NaN stays NaN.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  // x - floor(x) and p * 2^floor(x) are one instruction each, right for -inf and for any exponent: 7 in all.
  constexpr float c1 = 0.6931512951850891f, c2 = 0.24016444385051727f, c3 = 0.05579991266131401f,
                  c4 = 0.009017029777169228f, c5 = 0.0018671301659196615f;
  const Vec part = (Vec)_mm512_reduce_ps((__m512)x, 1);
  const Vec poly = ((((c5 * part + c4) * part + c3) * part + c2) * part + c1) * part + 1.0f;
  return (Vec)_mm512_scalef_ps((__m512)poly, (__m512)x);
#else
  constexpr float c1 = 0.693147f, c2 = 0.24022242f, c3 = 0.055507336f, c4 = 0.009671513f, c5 = 0.0013264727f;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec clamped = x < -126.0f ? splat(-126.0f) : x;
  const Vec shifted = clamped + magic;
  const Vec part = clamped - (shifted - magic);
  const Vec poly = ((((c5 * part + c4) * part + c3) * part + c2) * part + c1) * part + 1.0f;
  const VecInt bits = ((VecInt)shifted - 0x4B400000 + 127) << 23;
  const Vec value = poly * (Vec)bits;
  return x < -126.0f ? splat(0.0f) : value;
#endif
}

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t exponent = (h >> 10) & 0x1Fu, mantissa = h & 0x3FFu, bits;
  if (exponent == 0x1Fu) {
    bits = sign | 0x7F800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else if (mantissa == 0) {
    bits = sign;
  } else {
    exponent = 113;
    while (!(mantissa & 0x400u)) mantissa <<= 1, --exponent;
    bits = sign | (exponent << 23) | ((mantissa & 0x3FFu) << 13);
  }
  float value;
  memcpy(&value, &bits, 4);
  return value;
#endif
}

inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(value, 0));
#else
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return sign | 0x7E00u;
  if (bits >= 0x477FF000u) return sign | 0x7C00u;  // rounds to infinity
  if (bits < 0x33000001u) return sign;             // rounds to zero
  int shift = 13;
  uint32_t mantissa = bits, base = 0;
  if (bits < 0x38800000u) {  // subnormal half
    shift = 126 - static_cast<int>(bits >> 23);
    mantissa = (bits & 0x7FFFFFu) | 0x800000u;
  } else {
    base = 0;
    mantissa = bits - 0x38000000u;
  }
  const uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
  return static_cast<uint16_t>(sign | (base + kept + ((rest > half || (rest == half && (kept & 1u))) ? 1u : 0u)));
#endif
}

inline float bfloat_to_float(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_bfloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline float load_one(const void* p, DType dtype, int64_t at) {
  if (dtype == kFloat32) return static_cast<const float*>(p)[at];
  const uint16_t raw = static_cast<const uint16_t*>(p)[at];
  return dtype == kBFloat16 ? bfloat_to_float(raw) : half_to_float(raw);
}

// Float copy of `count` elements from `at` on, with an element stride.
inline void stage(float* __restrict__ out, const void* p, DType dtype, int64_t at, int64_t stride, int64_t count) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = load_one(p, dtype, at + i * stride);
    return;
  }
  if (dtype == kFloat32) {
    memcpy(out, static_cast<const float*>(p) + at, count * sizeof(float));
  } else if (dtype == kBFloat16) {
    const uint16_t* __restrict__ in = static_cast<const uint16_t*>(p) + at;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
      memcpy(out + i, &bits, 4);
    }
  } else {
    const uint16_t* __restrict__ in = static_cast<const uint16_t*>(p) + at;
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
      _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
    for (; i < count; ++i) out[i] = half_to_float(in[i]);
  }
}

// Rounds `count` floats to the 16-bit dtype (nearest even) at a contiguous place.
inline void unstage(void* p, DType dtype, int64_t at, const float* __restrict__ in, int64_t count) {
  if (dtype == kFloat32) {
    memcpy(static_cast<float*>(p) + at, in, count * sizeof(float));
    return;
  }
  uint16_t* __restrict__ out = static_cast<uint16_t*>(p) + at;
  int64_t i = 0;
  if (dtype == kBFloat16) {
    for (; i < count; ++i) {
      uint32_t bits;
      memcpy(&bits, in + i, 4);
      const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
      const uint32_t quiet = (bits >> 16) | 0x40u;
      out[i] = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
    }
    return;
  }
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(in + i), 0));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#endif
  for (; i < count; ++i) out[i] = float_to_half(in[i]);
}

// A float view of `count` elements: the memory itself where it already is unit-stride float32 in whole vectors,
// else a copy in `buffer`, padded up to a whole vector with `padding`.
inline const float* view_block(float* buffer, const void* p, DType dtype, int64_t at, int64_t stride, int64_t count,
                               float padding) {
  if (dtype == kFloat32 && stride == 1 && count % kWidth == 0) return static_cast<const float*>(p) + at;
  stage(buffer, p, dtype, at, stride, count);
  for (int64_t i = count; i % kWidth != 0; ++i) buffer[i] = padding;
  return buffer;
}

}  // namespace
