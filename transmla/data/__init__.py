"""Text in: definitions, loading, conversations, mixtures, rows, windows."""
