"""Quality: perplexity, KL to the teacher and top-1 agreement, and the report that shows them."""
