"""Hides a warning that an import of PEFT brings and nobody can use. It must be imported before PEFT.

PEFT imports bitsandbytes wherever that is installed. On some processors that looks for a kernel of products with 4-bit
weights, and warns where it finds none; here such weights are dequantised (`fastpeft/ops/quantise.py`).
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)
