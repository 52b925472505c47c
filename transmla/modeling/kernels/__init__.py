"""Softmax attention: one file per kernel, and the choice between them."""
