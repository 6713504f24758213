"""One rewrite under way: what passes work on, what they promise, and how that is checked on their result."""
