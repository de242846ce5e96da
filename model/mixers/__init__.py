"""The token mixers by name. One file each; `model.config.MIXERS` holds their descriptions, free of torch."""

from lazypipe.model.config import AnyMixer, ModelConfig
from lazypipe.model.mixers.alibi import AlibiAttention
from lazypipe.model.mixers.base import SideInputs, TokenMixer
from lazypipe.model.mixers.elliptical import EllipticalAttention
from lazypipe.model.mixers.entmax import EntmaxAttention
from lazypipe.model.mixers.gating import GatingMixer
from lazypipe.model.mixers.lazy import LazyAttention
from lazypipe.model.mixers.mlp import MlpMixer
from lazypipe.model.mixers.side_qk import RandomQKAttention, SideQKAttention, TextQKAttention
from lazypipe.model.mixers.sigmoid import SigmoidAttention
from lazypipe.model.mixers.sink import SinkAttention
from lazypipe.model.mixers.softmax1 import Softmax1Attention
from lazypipe.model.mixers.standard import StandardAttention
from lazypipe.model.mixers.static_qk import StaticQKAttention
from lazypipe.model.mixers.stick_breaking import StickBreakingAttention
from lazypipe.model.mixers.swa import SlidingWindowAttention
from lazypipe.model.mixers.taylor import TaylorAttention

__all__ = ["SideInputs", "SideQKAttention", "TokenMixer", "build_mixer"]


def build_mixer(config: ModelConfig, mixer: AnyMixer, kernel: str = "auto") -> TokenMixer:
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
        case "random_qk":
            return RandomQKAttention(config)
        case "text_qk":
            return TextQKAttention(config)
        case "static_qk":
            return StaticQKAttention(config)
        case "softmax1":
            return Softmax1Attention(config)
        case "sink":
            return SinkAttention(config)
        case "sigmoid":
            return SigmoidAttention(config)
        case "entmax":
            return EntmaxAttention(config)
        case "stick_breaking":
            return StickBreakingAttention(config)
        case "elliptical":
            return EllipticalAttention(config)
        case "alibi":
            return AlibiAttention(config)
        case "swa":
            return SlidingWindowAttention(config)
        case _:
            raise ValueError(
                f"{mixer} is a whole model and no mixer; build it with lazypipe.model.baselines.build_model"
            )
