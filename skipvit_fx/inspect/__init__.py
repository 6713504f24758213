"""Looking at a rewritten model: layer table, diff, graph, and the tokens it keeps."""
