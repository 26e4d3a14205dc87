"""Jobs: many pictures from a file of requests (`sdjax.batch` runs them)."""
