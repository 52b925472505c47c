"""Modules that hold weights: the MLA attention, its kernels, the student."""
