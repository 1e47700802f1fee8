"""Programs that are compared: ours, and others where they are installed."""
