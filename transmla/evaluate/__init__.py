"""Quality: perplexity, KL to the teacher, top-1 agreement, questions with choices, and the report that shows them."""
