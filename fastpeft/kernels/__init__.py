"""Triton kernels, named after the operations that they are the fast form of."""
