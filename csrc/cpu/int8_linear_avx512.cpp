#if defined(__x86_64__)
#include "wide.h"
#define FASTPEFT_ISA avx512
#define FASTPEFT_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl" FASTPEFT_WHOLE_REGISTERS)))
#include "int8_linear_tile.h"
#endif
