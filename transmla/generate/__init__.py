"""Text out: samplers, decoding, prompts, problems, checkers."""
