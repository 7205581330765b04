"""What is measured and how; `LOG.md` keeps what did not work."""
