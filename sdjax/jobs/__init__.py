"""Jobs: many pictures from a file of requests (`sdjax.jobs.run` runs them)."""
