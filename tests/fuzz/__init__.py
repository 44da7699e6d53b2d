"""Mutated files through the command lines, as SECURITY.md counts them; `python -m tests.fuzz --help`."""
