"""Training: data, losses, optimiser, recipes and runs."""
