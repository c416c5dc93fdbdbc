// All loops of variants.h for the instruction set that the including file names, see siva_linear_tile.h.
#include "dequantise_tile.h"
#include "int8_linear_tile.h"
#include "mezo_perturb_tile.h"
#include "side_step_tile.h"
#include "siva_linear_tile.h"
#include "window_attention_tile.h"

#define FASTPEFT_TEXT(name) #name
#define FASTPEFT_NAME(name) FASTPEFT_TEXT(name)

namespace fastpeft {
namespace FASTPEFT_ISA {

const Variant variant = {FASTPEFT_NAME(FASTPEFT_ISA), mezo_perturb::perturb,     mezo_perturb::drop,
                         siva_linear::low_rank,       int8_linear::int8,         dequantise::dequantisers,
                         window_attention::passes,    side_step::vector_products};

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
