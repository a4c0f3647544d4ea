"""Time travel: keeps snapshots of a training, goes back to them, and runs experiments from them."""
