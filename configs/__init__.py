"""Training configurations: one file each, whose `config()` returns a frozen dataclass."""
