#if defined(__x86_64__)
#define FASTPEFT_ISA avx512
// GCC would use half of each register on its own account
#if defined(__clang__)
#define FASTPEFT_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,f16c")))
#else
#define FASTPEFT_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,f16c,prefer-vector-width=512")))
#endif
#define FASTPEFT_VECTOR_BYTES 64
#include "mezo_perturb_tile.h"
#endif
