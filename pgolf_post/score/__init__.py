"""Scoring: a model and a text → bits per byte, by the challenge's protocols; called, it is `stage.score`."""

from pgolf_post.base.callable_package import make_callable

make_callable(__name__, "stage:score")
