"""The command line: `main` dispatches, and each command is a module of its name.

Imports: everything else. A command imports jax only if it needs jax.
"""
