// The instruction set is chosen when the library runs, not when it is built, so one binary serves every CPU.
#pragma once

namespace cmt_fast {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best instruction set of this CPU, at most what CMT_FAST_CPU_ISA names.
Isa cpu_isa();

}  // namespace cmt_fast

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CMT_FAST_X86 1
#define CMT_FAST_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define CMT_FAST_TARGET_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define CMT_FAST_X86 0
#define CMT_FAST_TARGET_AVX2
#define CMT_FAST_TARGET_AVX512
#endif

#define CMT_FAST_INLINE inline __attribute__((always_inline))
#define CMT_FAST_LAMBDA_INLINE __attribute__((always_inline))
#define CMT_FAST_NOINLINE __attribute__((noinline))
