"""The recorder: takes measurements off the training thread and gives them to viewers and sinks."""
