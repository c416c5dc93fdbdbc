"""Rows and labels, what makes their scores, and base models."""
