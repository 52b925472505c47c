"""Text: definitions of datasets, fixed windows for calibration and evaluation."""
