"""Where a run's story goes when no app is looking: plain lines and JSON lines."""
