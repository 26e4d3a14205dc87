"""Where programs run: placements of pictures and parameters on devices, the platform, and kept compiled programs."""
