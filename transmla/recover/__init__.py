"""Recovery: trl trainers that bring the student back to the teacher."""
