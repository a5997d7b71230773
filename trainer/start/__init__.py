"""The model that a run begins with: new, started from the training's text, or from another model."""
