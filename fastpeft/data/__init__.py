"""Rows and labels, and what makes their scores."""
