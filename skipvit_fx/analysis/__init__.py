"""What the graph means: token axes, attention sites, layers. Nothing here changes a graph."""
