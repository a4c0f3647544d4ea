"""Changes the settings of a training while it runs: learning rates, clipping, freezing, batches."""
