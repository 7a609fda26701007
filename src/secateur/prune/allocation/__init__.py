"""Choose the sparsity of each matrix under one budget for all: `--modules auto`, and its baseline `--modules owl`."""
