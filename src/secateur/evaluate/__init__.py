"""What a checkpoint can do, what it lost, and what a prune would take."""
