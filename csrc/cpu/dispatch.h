// One loop for three instruction sets: ForIsa<Body>::pick() is Body::run compiled for the best one of this CPU.
#pragma once

#include <cstdint>

#include "isa.h"

namespace cmt_fast {

// Body has a type Args and `template <int BYTES> static void run(const Args&, int64_t begin, int64_t end)` (always inlined) for vectors of
// BYTES bytes.
template <typename Body>
struct ForIsa {
  using Args = typename Body::Args;
  using Run = void (*)(const Args&, int64_t, int64_t);

  static void baseline(const Args& args, int64_t begin, int64_t end) { Body::template run<16>(args, begin, end); }
  CMT_FAST_TARGET_AVX2 static void avx2(const Args& args, int64_t begin, int64_t end) {
    Body::template run<32>(args, begin, end);
  }
  CMT_FAST_TARGET_AVX512 static void avx512(const Args& args, int64_t begin, int64_t end) {
    Body::template run<64>(args, begin, end);
  }

  static Run pick() {
    constexpr Run table[] = {baseline, avx2, avx512};
    return table[static_cast<int>(cpu_isa())];
  }
};

}  // namespace cmt_fast
