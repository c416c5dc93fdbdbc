#if defined(__x86_64__)
#include "wide.h"
#define FASTPEFT_ISA avx512
#define FASTPEFT_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,f16c" FASTPEFT_WHOLE_REGISTERS)))
#define FASTPEFT_VECTOR_BYTES 64
#include "variant_tiles.h"
#endif
