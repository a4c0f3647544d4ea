"""Changes a training while it runs, keeps snapshots of it, and goes back to them."""
