// The loops for AVX2. All other headers come first, so that none of their code is compiled for it.
#include "cpu/loops.h"

#ifdef EFFICIENT_DENSENET_X86_LEVELS
#include <immintrin.h>

#pragma GCC target("avx2")
#define EFFICIENT_DENSENET_VECTOR_BYTES 32
#include "cpu/loops_impl.h"

namespace efficient_densenet::cpu {
const AllLoops kAvx2Loops = kAll;
}
#endif
