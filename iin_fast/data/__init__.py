"""What comes in: adapters of pretrained models, and files of their latents."""

from .adapters import (
    Adapter,
    HuggingFaceAdapter,
    LayerAdapter,
    from_huggingface,
    from_layer,
    pool_features,
    unpool_features,
)
from .augment import augmentation_pairs
from .encode import encode_all, write_latents
from .latents import MISSING, Latents, class_context, load_latents, save_arrays

__all__ = [
    "MISSING",
    "Adapter",
    "HuggingFaceAdapter",
    "Latents",
    "LayerAdapter",
    "augmentation_pairs",
    "class_context",
    "encode_all",
    "from_huggingface",
    "from_layer",
    "load_latents",
    "pool_features",
    "save_arrays",
    "unpool_features",
    "write_latents",
]
