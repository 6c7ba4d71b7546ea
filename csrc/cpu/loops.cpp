// The loops for what every machine has, and the choice among instruction sets.
#include "cpu/loops.h"

#include <cstdlib>
#include <cstring>

#include "cpu/loops_impl.h"

namespace efficient_densenet::cpu {

const AllLoops kBaselineLoops = kAll;

namespace {

const AllLoops& choose_loops() {
#ifdef EFFICIENT_DENSENET_X86_LEVELS
  const char* const allowed = std::getenv("ATEN_CPU_CAPABILITY");
  const auto is = [&](const char* level) {
    return allowed != nullptr && std::strcmp(allowed, level) == 0;
  };
  if (is("default")) return kBaselineLoops;
  if (!is("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return kAvx512Loops;
  }
  if (__builtin_cpu_supports("avx2")) return kAvx2Loops;
#endif
  return kBaselineLoops;
}

}  // namespace

const AllLoops& all_loops() {
  static const AllLoops& chosen = choose_loops();
  return chosen;
}

}  // namespace efficient_densenet::cpu
