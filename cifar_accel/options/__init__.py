"""Every option once: its type, default and meaning, what words and recipes make of it, and its checks."""
