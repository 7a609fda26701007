"""What ships with the package: a small model and the way to the built-in text."""
