"""The author's code: run, asked and left as it was. What it raises, draws, caches and changes, and whose it is."""
