// Elementary functions of float vectors, for every instruction set. No torch headers.
#pragma once

#include "vec.h"

namespace cmt_fast {

template <int N>
using Floats = Vec<float, N>;

template <int N>
CMT_FAST_INLINE void fill(Floats<N>& v, float value) {
  v = value - Floats<N>{};  // a broadcast; an addition of zero would not be one, as it changes -0
}

// One half after the other, in log2 N steps.
template <int N>
CMT_FAST_INLINE float sum_lanes(const Floats<N>& v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Floats<N / 2> low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    low += high;
    return sum_lanes<N / 2>(low);
  }
}

template <int N>
CMT_FAST_INLINE float max_lanes(const Floats<N>& v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Floats<N / 2> low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    low = low > high ? low : high;
    return max_lanes<N / 2>(low);
  }
}

// x -> x Phi(x) = x / 2 + x / 2 erf(x / sqrt 2), the exact GELU. erf is x P(x^2) / Q(x^2), a minimax fit on |x| < 5.5 with an error of
// 1.5e-8; beyond, where erf is 1 in float32, the quotient stays at its end and the product with x passes 1.
template <int N>
CMT_FAST_INLINE void gelu(Floats<N>& x) {
  using V = Floats<N>;
  constexpr float kEnd = 5.5f * 5.5f;
  V s = x * x;
  s = s < kEnd ? s : kEnd - V{};
  V p = s * 4.54986382636222e-08f + 1.2704261087246623e-05f;
  V q = s * 1.1975035110487132e-06f + 7.364797295295222e-05f;
  p = p * s + 0.0003376541937826208f;
  q = q * s + 0.001884452896958532f;
  p = p * s + 0.009354538731673585f;
  q = q * s + 0.02864595058828287f;
  p = p * s + 0.06770556594583796f;
  q = q * s + 0.2515222612857147f;
  p = p * s + 0.797884469244656f;
  q = q * s + 1.0f;
  V erf = x * p / q;
  erf = erf < 1.0f ? erf : 1.0f - V{};
  erf = erf > -1.0f ? erf : -1.0f - V{};
  const V half = x * 0.5f;
  x = half * erf + half;
}

// x -> 2^x for x <= 0, with a relative error of 2e-7; 0 below -126. NaN stays NaN.
template <int N>
CMT_FAST_INLINE void exp2_of_negative(Floats<N>& x) {
  using V = Floats<N>;
  using I = Vec<uint32_t, N>;
  const V low = x > -126.0f ? x : -126.0f - V{};
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  constexpr float kRound = 12582912.0f;
  const V shifted = low + kRound;
  const V f = low - (shifted - kRound);  // in [-1/2, 1/2]
  V p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  I exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof(V));
  std::memcpy(&bits, &p, sizeof(V));
  bits += exponent << 23;  // the bits of kRound above its integer part fall off
  std::memcpy(&p, &bits, sizeof(V));
  const V in_range = x < -126.0f ? V{} : p;
  x = x == x ? in_range : x;
}

}  // namespace cmt_fast
