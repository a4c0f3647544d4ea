"""Exports a recorded run in the formats of other tools, streamed in bounded memory."""
