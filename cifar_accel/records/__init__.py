"""What a run leaves: its folder, checkpoints, summary, metrics, trackers, progress."""
