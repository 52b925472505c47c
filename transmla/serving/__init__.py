"""What serving engines load of this package where a checkpoint is of the student's own class."""
