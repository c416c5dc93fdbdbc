"""Prompts: templates, label words, and the model that answers by them."""
