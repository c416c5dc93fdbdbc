#if defined(__x86_64__)
#define FASTPEFT_ISA avx2
#define FASTPEFT_TARGET __attribute__((target("avx2")))
#include "int8_linear_tile.h"
#endif
