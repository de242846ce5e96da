"""The token mixers by name. One file each; `model.config.MIXERS` holds their descriptions, free of torch."""

from model.config import ModelConfig
from model.mixers.interface import TokenMixer
from model.mixers.lazy import LazyAttention
from model.mixers.standard import StandardAttention


def build_mixer(config: ModelConfig, kernel: str = "auto") -> TokenMixer:
    """The token mixer `config.mixer` of one layer, uninitialised. `kernel` is the backend of Lazy Attention."""
    match config.mixer:
        case "standard":
            return StandardAttention(config)
        case "lazy":
            return LazyAttention(config, kernel)
