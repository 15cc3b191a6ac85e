"""Models, data and training of the recommendation scaling-law laboratory."""
