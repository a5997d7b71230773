"""The update of the weights from their gradients, and averages of the weights."""
