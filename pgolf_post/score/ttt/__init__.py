"""Test-time training: adapting to a text while scoring it, each token's nats committed before any step sees it."""
