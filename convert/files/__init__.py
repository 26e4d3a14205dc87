"""Checkpoint files of every format: names, dtypes and shapes at once, the numbers tensor by tensor (`open_source`)."""
