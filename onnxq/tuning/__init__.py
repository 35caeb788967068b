"""What each layer does to a model, and formats chosen by it: `sensitivity` and `tune`."""
