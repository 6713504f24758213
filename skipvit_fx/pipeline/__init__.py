"""Passes, the order they run in, and the record of what they did."""
