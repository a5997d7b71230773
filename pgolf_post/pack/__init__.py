"""Packing: symbols → the smallest bytes, counted, decoded by the decoder that ships; called, it is `container.pack`."""

from pgolf_post.base.callable_package import make_callable

make_callable(__name__, "container:pack")
