"""What can be wrong with a model on disk or with the memory it wants. Each message is one clear sentence."""


class ModelError(Exception):
    """The model cannot be loaded; the message names the file, key or tensor and what to do."""


class UnsupportedModelError(ModelError):
    """A config key, tensor or value that this code does not understand, named in the message."""


class NotEnoughMemoryError(ModelError):
    """Weights, activations and KV cache do not fit; the message names the sizes and the knobs."""
