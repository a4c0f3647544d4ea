"""Looking into the tensors of a run: on the training thread, at its gate, without changing any."""
