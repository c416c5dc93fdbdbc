"""Fine-tune transformers on little memory: SiVA, k-LST and MeZO on custom kernels."""

__version__ = "0.1.0"
