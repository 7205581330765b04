"""Models: made, changed, loaded and saved."""
