"""The instruments of the app, each drawn from the current snapshot."""
