"""The three networks, as linen modules that are built from their config alone."""
