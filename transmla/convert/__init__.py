"""Conversion: calibration, decoupling of RoPE, joint low rank, refit, search (docs/conversion.md)."""
