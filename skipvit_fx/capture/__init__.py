"""From a model to a graph that computes the same: two front ends, and what they share."""
