"""How passes run, and what is checked of their result."""
