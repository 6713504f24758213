"""What is publicly known of Ascend's tools, held against a file or a model. Nothing of Ascend is run."""
