"""The commands that have no script of the original's name."""
