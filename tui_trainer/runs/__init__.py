"""The runs on this machine's disk: which there are, whether each is live, and what can be read of
its directory. Never imports torch."""
