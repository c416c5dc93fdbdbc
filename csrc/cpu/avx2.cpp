#if defined(__x86_64__)
#define FASTPEFT_ISA avx2
#define FASTPEFT_TARGET __attribute__((target("avx2,fma,f16c")))
#define FASTPEFT_VECTOR_BYTES 32
#include "variant_tiles.h"
#endif
