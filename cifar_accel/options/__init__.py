"""Every option once: type, default, meaning, checks, and what words and recipes make of it."""
