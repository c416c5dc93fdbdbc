"""`load_run`, under the name by which model cards import it."""

from fastpeft.training.loading import load_run

__all__ = ["load_run"]
