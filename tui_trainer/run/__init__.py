"""The run process: it trains, serves viewers, writes checkpoints and prints lines."""
