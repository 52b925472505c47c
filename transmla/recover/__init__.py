"""Training: trl trainers, losses, teachers, checkpoints."""
