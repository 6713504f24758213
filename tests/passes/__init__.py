"""Each pass alone, on a model whose graph can be read."""
