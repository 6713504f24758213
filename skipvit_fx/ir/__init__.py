"""The graph: how it is captured, interpreted on fake tensors, edited and owned."""
