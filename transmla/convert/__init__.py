"""The closed form: calibration, rope, low rank, refit, search; in float64."""
