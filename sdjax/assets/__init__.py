"""Data files that every installation carries, and the scripts that made them."""
