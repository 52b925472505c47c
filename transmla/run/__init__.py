"""Doing it: one `Run`, one file per stage, their order, and the artifacts that they leave."""
