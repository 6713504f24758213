"""What changes from epoch to epoch."""
