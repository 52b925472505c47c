"""Tables, figures and text of a run's report."""
