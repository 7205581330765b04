"""Where samples come from, in which order they go, and how they are augmented on the way."""
