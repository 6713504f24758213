"""What the compiler inserts into a graph: plain modules without parameters, no graph code."""
