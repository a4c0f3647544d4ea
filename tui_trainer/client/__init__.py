"""Sessions with a run: live, over ssh, or recorded. Never imports torch."""
