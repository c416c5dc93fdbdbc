// Beside the instruction set that a function is compiled for: whole registers. GCC would use half of each on its own
// account; clang uses them and ignores an attribute that has this word.
#pragma once

#if defined(__clang__)
#define FASTPEFT_WHOLE_REGISTERS ""
#else
#define FASTPEFT_WHOLE_REGISTERS ",prefer-vector-width=512"
#endif
