"""The operating system's side of a run: signals, launcher and other processes, the lock of its folder, faults."""
