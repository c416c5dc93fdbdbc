"""MeZO: fine-tuning by two forward passes and a seed, with no gradients, activations or noise in memory."""

from fastpeft.mezo.estimator import FZOO, SPSA, step_seed
from fastpeft.mezo.exact import Exact
from fastpeft.mezo.in_place import InPlace
from fastpeft.mezo.journal import Journal
from fastpeft.mezo.journal_format import Kind, Record
from fastpeft.mezo.optimizer import MeZO

__all__ = ["FZOO", "SPSA", "Exact", "InPlace", "Journal", "Kind", "MeZO", "Record", "step_seed"]
