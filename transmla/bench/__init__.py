"""What the kernels and stages of a recipe cost on this machine, without the model's weights or any text."""
