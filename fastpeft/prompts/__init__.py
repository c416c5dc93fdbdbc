"""Prompts: templates, label words, and the model that answers by them."""

from fastpeft.prompts.template import Prompt

__all__ = ["Prompt"]
