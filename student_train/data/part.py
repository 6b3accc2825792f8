"""What a micro-batch holds of one signal."""


class Part:
    """A frozen dataclass of tensors, and of dicts and dataclasses of them."""

    __slots__ = ()
