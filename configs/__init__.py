"""Configurations of runs and servers: one file each, with a function `config()`."""
