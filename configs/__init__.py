"""Training configurations: one file each, with a function `config()`."""
