"""The final checkpoint: DeepSeek's names, configuration and weights; the reload check."""
