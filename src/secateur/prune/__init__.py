"""Prune one model: check the request, read the text, plan, cut and write each block, and append the record.

The main path is `run.prune`. `driver` is the loop over blocks; it leaves the results to its caller.
"""
