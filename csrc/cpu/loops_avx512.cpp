// The loops for AVX-512. All other headers come first, so that none of their code is compiled for
// it.
#include "cpu/loops.h"

#ifdef EFFICIENT_DENSENET_X86_LEVELS
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#define EFFICIENT_DENSENET_VECTOR_BYTES 64
#include "cpu/loops_impl.h"

namespace efficient_densenet::cpu {
const AllLoops kAvx512Loops = kAll;
}
#endif
