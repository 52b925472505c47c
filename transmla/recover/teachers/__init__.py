"""What a loss knows of a teacher that is not asked anew for every batch."""
