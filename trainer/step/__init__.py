"""One training step up to its gradients: tokens, loss, forward and backward, and the ranks that share it."""
