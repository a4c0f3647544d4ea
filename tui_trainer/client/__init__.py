"""A link to a run, as the app sees it: live, over ssh, or recorded. Never imports torch."""
