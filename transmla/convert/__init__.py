"""Conversion: calibration, decoupling of RoPE, joint low rank. Pure float64 mathematics around one streaming pass."""
