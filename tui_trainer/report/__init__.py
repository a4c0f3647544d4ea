"""One page about a run: self-contained HTML with charts drawn here as SVG."""
