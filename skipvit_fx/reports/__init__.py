"""Reports on a model: attention sites, layer table, costs, diff, and the tokens that it keeps."""
