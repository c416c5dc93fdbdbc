"""MeZO: fine-tuning by two forward passes and a seed, with no gradients, activations or noise in memory."""

from fastpeft.mezo.journal import Journal, Kind, Record
from fastpeft.mezo.optimizer import MeZO
from fastpeft.mezo.steps import step_seed

__all__ = ["Journal", "Kind", "MeZO", "Record", "step_seed"]
