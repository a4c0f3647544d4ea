"""Answers to requests for inspection: decoded, labelled, searched, and exported to files."""
