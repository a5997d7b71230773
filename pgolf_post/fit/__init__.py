"""Fit: a byte budget → the step sizes at which a bit buys the same loss everywhere; called, it is `artifact.fit`."""

from pgolf_post.base.callable_package import make_callable

make_callable(__name__, "artifact:fit")
