"""MeZO: fine-tuning by two forward passes and a seed, with no gradients, activations or noise in memory."""

from fastpeft.mezo.optimizer import MeZO, step_seed

__all__ = ["MeZO", "step_seed"]
