"""From a model or predictions to figures with intervals and a report."""
