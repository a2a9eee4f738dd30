#include "isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace cmt_fast {
namespace {

Isa best_of_this_cpu() {
#if CMT_FAST_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? Isa::kAvx512 : Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

Isa requested(Isa best) {
  const char* value = std::getenv("CMT_FAST_CPU_ISA");
  const std::string name = value == nullptr ? "" : value;
  if (name.empty()) return best;
  Isa wanted = Isa::kBaseline;
  if (name == "avx512") {
    wanted = Isa::kAvx512;
  } else if (name == "avx2") {
    wanted = Isa::kAvx2;
  } else {
    STD_TORCH_CHECK(name == "baseline", "the environment variable CMT_FAST_CPU_ISA must be one of 'baseline', 'avx2', ",
                    "'avx512', got '", name, "'");
  }
  return wanted < best ? wanted : best;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = requested(best_of_this_cpu());
  return isa;
}

}  // namespace cmt_fast
