"""The token mixers by name. One file each; `model.config.MIXERS` holds their descriptions, free of torch."""

from model.config import MixerName, ModelConfig
from model.mixers.gating import GatingMixer
from model.mixers.interface import SideInputs, TokenMixer
from model.mixers.lazy import LazyAttention
from model.mixers.mlp import MlpMixer
from model.mixers.standard import StandardAttention
from model.mixers.static_qk import StaticQKAttention
from model.mixers.taylor import TaylorAttention

__all__ = ["SideInputs", "TokenMixer", "build_mixer"]


def build_mixer(config: ModelConfig, mixer: MixerName, kernel: str = "auto") -> TokenMixer:
    """The token mixer of one layer by name, uninitialised. `kernel` is the backend of Lazy Attention."""
    match mixer:
        case "standard":
            return StandardAttention(config)
        case "lazy":
            return LazyAttention(config, kernel)
        case "mlp":
            return MlpMixer(config)
        case "taylor":
            return TaylorAttention(config)
        case "gating":
            return GatingMixer(config)
        case "static_qk":
            return StaticQKAttention(config)
