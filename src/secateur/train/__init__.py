"""Shared by everything that trains: the windows of a step, and the saved state that an interrupted run goes on from."""
