"""The command line, `python -m eplb_jax`.

Imports: placement, recordings, pictures.
"""
