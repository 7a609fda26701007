"""Recipes: the steps that make a checkpoint, in a file that people share and run again.

`notation` is the YAML, `fields` are the options of a step, `read` reads a recipe and refuses what is wrong with it, and
`write` writes the one that lies in every result. `study.recipe` runs them.
"""
