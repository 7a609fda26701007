"""How much to remove of each matrix, under one budget for all of them: `--modules auto`, and what it is compared with."""
