"""The machine: its processes, signals, memory and speed."""
