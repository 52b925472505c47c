"""Exported checkpoints in serving engines, where these are installed: `pytest -m serving -n0`."""
