"""Names of a model's parameters that say what they belong to."""

ATTENTION = ".self_attn."  # marks the parameters that conversion replaces
