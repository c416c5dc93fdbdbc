"""Measurements: speed of the ops against what else one would use, and what the kernels compile to."""
