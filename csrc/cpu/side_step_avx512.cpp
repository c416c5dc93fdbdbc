#if defined(__x86_64__)
#define FASTPEFT_ISA avx512
#define FASTPEFT_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))
#define FASTPEFT_VECTOR_BYTES 64
#include "side_step_tile.h"
#endif
