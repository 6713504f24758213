"""A rewritten model to look at: one page, opened from disk."""
