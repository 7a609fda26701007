"""Studies: many runs that answer one question, each run a record."""
