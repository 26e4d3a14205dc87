"""What is written to disk: files and folders that appear whole."""
