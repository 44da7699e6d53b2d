"""Faults on purpose, as the README's reliability table counts them; `python -m tests.faults --help`."""
