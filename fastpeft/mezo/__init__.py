"""MeZO: fine-tuning by two forward passes and a seed, with no gradients, activations or noise in memory."""

from fastpeft.mezo.estimator import step_seed
from fastpeft.mezo.journal import Journal
from fastpeft.mezo.journal_format import Kind, Record
from fastpeft.mezo.optimizer import MeZO

__all__ = ["Journal", "Kind", "MeZO", "Record", "step_seed"]
