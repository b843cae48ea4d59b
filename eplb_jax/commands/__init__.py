"""The command line, `python -m eplb_jax`: `main`, and a file for each command.

Imports: placement, files, recordings, pictures.
"""
