"""What is told of a model: attention sites, layer table, costs, diff, and the tokens that it keeps."""
