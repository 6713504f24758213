"""The author's code: run, questioned and left unchanged. What it raises, draws, caches and changes."""
