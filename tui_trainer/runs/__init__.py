"""The runs on this machine's disk: lists and finds them, decides whether each is live, and reads
their directories. Never imports torch."""
