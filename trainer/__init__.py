"""The lean trainer: real text in, complete checkpoints at every phase boundary out, nothing after that."""
