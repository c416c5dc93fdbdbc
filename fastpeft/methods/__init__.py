"""What `--method` offers: one registry of methods, and how each trains by default."""
