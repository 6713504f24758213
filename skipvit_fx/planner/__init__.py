"""The search for plans: one captured graph on which many plans are tried, and what they cost and preserve."""
