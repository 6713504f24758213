"""The report: one HTML file that shows what a rewrite did to a model, and to images."""
