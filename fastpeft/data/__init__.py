"""Rows and labels, what makes their scores, and base models."""

from fastpeft.data.examples import load_data

__all__ = ["load_data"]
