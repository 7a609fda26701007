"""Records turned into one HTML page and its plots."""
