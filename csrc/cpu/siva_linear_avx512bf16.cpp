#if defined(__x86_64__)
#define FASTPEFT_ISA avx512bf16
#define FASTPEFT_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16")))
#define FASTPEFT_VECTOR_BYTES 64
#define FASTPEFT_BFLOAT16
#include "siva_linear_tile.h"
#endif
