"""The shipped tasks, and what a third party's task has to define."""
