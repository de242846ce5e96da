"""No token mixing at all: a second gated MLP in the place of attention ("Deconstructing Attention", 2510.11602)."""

import torch.nn.functional as F
from torch import Tensor

from lazypipe.model.cache import LayerCache, RecurrentState
from lazypipe.model.config import ModelConfig
from lazypipe.model.layers import Linear
from lazypipe.model.mixers.base import BlockInputs, BlockOutputs, TokenMixer


class MlpMixer(TokenMixer):
    """W_down(SiLU(H W_gate) * (H W_up)), each position by itself.

    Its width makes the three matrices as large as the four of attention, 4/3 hidden when no heads are grouped. It has
    no attention weights and remembers nothing while decoding.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.mlp_mixer_size)
        self.up_proj = Linear(config.hidden_size, config.mlp_mixer_size)
        self.down_proj = Linear(config.mlp_mixer_size, config.hidden_size, into_residual=True)

    def forward(
        self,
        x: Tensor,
        inputs: BlockInputs,  # noqa: ARG002
        cache: LayerCache | None = None,  # noqa: ARG002
    ) -> BlockOutputs:
        return BlockOutputs(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))

    def new_cache(self, max_tokens: int) -> LayerCache:  # noqa: ARG002
        return RecurrentState()

    def attention_rows(self, x: Tensor, inputs: BlockInputs, query_block: int) -> None:  # noqa: ARG002
        return None
