"""What will happen: everything that is refused before weights load, memory, disk, and the dry run."""
