"""The published scripts, by their names, and what the trainers share."""
