"""The base of all other packages: errors, records, progress, devices, timing."""
