"""One page about a run: self-contained HTML with charts drawn as SVG."""
