"""What tests share: models, the reference that shares no code with the package, and ways to compare."""
