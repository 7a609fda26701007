"""The report: one HTML page with its plots, made from records."""
