// For every processor of the architecture.
#define FASTPEFT_ISA baseline
#define FASTPEFT_TARGET
#include "int8_linear_tile.h"
