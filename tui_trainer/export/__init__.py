"""A recorded run in the formats of other tools. Everything streams: memory does not grow with the
length of a run."""
