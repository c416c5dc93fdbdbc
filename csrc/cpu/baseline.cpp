// For every processor of the architecture: SSE2 on x86-64, NEON on AArch64.
#define FASTPEFT_ISA baseline
#define FASTPEFT_TARGET
#define FASTPEFT_VECTOR_BYTES 16
#include "variant_tiles.h"
