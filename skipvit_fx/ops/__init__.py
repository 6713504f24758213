"""The modules that the compiler inserts into a graph: plain ones without parameters or graph code."""
