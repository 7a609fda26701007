"""Pruning one model: a request is checked, its text read, each block planned, cut and written, and the record told.

The main path is `run.prune`; `driver` is its loop over blocks, for whatever is done with them.
"""
