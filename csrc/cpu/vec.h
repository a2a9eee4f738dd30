// Vectors of channels in plain C++ (the vector extension of GCC and Clang; any CPU). Arguments go by reference, so that
// no calling convention depends on the instruction set. No torch headers here.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "isa.h"

namespace cmt_fast {

struct bf16 {
  uint16_t bits;
};

// The type that sums are kept in.
template <typename T>
struct AccOf {
  using type = T;
};
template <>
struct AccOf<bf16> {
  using type = float;
};
template <typename T>
using Acc = typename AccOf<T>::type;

template <typename E, int N>
struct VecOf {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};
template <typename E, int N>
using Vec = typename VecOf<E, N>::type;

template <int N, typename T>
CMT_FAST_INLINE void load(Vec<Acc<T>, N>& v, const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {  // bfloat16 is the upper half of a float
    Vec<uint16_t, N> half;
    std::memcpy(&half, p, sizeof(half));
    const Vec<uint32_t, N> bits = __builtin_convertvector(half, Vec<uint32_t, N>) << 16;
    std::memcpy(&v, &bits, sizeof(v));
  } else {
    std::memcpy(&v, p, sizeof(v));
  }
}

template <int N, typename T>
CMT_FAST_INLINE void store(T* p, const Vec<Acc<T>, N>& v) {
  if constexpr (std::is_same_v<T, bf16>) {  // round to nearest, ties to even; NaN stays NaN
    Vec<uint32_t, N> bits;
    std::memcpy(&bits, &v, sizeof(v));
    const Vec<uint32_t, N> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Vec<uint32_t, N> nan = Vec<uint32_t, N>{} + 0x7fc0;
    const Vec<uint16_t, N> half = __builtin_convertvector(v == v ? rounded : nan, Vec<uint16_t, N>);
    std::memcpy(p, &half, sizeof(half));
  } else {
    std::memcpy(p, &v, sizeof(v));
  }
}

// The first `count` elements, the rest zero. All of them where count is N or more.
template <int N, typename T>
CMT_FAST_INLINE void load_part(Vec<Acc<T>, N>& v, const T* p, int64_t count) {
  if (count >= N) {
    load<N>(v, p);
    return;
  }
  T buffer[N] = {};
  for (int64_t i = 0; i < count; i++) buffer[i] = p[i];
  load<N>(v, buffer);
}

// Stores the first `count` elements, none where it is not positive.
template <int N, typename T>
CMT_FAST_INLINE void store_part(T* p, const Vec<Acc<T>, N>& v, int64_t count) {
  if (count >= N) {
    store<N>(p, v);
    return;
  }
  T buffer[N];
  store<N>(buffer, v);
  for (int64_t i = 0; i < count; i++) p[i] = buffer[i];
}

template <typename T>
inline Acc<T> widen(T value) {
  Vec<Acc<T>, 1> v;
  load<1>(v, &value);
  return v[0];
}

template <typename T>
inline T narrow(Acc<T> value) {
  T result;
  store<1>(&result, Vec<Acc<T>, 1>{value});
  return result;
}

}  // namespace cmt_fast
