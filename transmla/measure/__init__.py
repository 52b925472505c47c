"""Numbers of a model: perplexity and KL, attention errors, choices, solved problems, intervals."""
