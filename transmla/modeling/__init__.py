"""Multi-head latent attention, its kernels, and the student that has it."""
