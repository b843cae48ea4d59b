"""Recipes of runs and servers: one file each, with a function `config()`.

The folder `configs/` of a checkout and the package `dualpipe_jax.configs` are the same.
"""
