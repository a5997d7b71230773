"""Diagnosis: numbers about weights, activations and scalars, the suspicious ones marked; called, `stage.diagnose`."""

from pgolf_post.base.callable_package import make_callable

make_callable(__name__, "stage:diagnose")
