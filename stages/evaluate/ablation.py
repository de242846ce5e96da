"""What a hybrid is worth without its mixers: a trained model scored with part of it taken out, never retrained.

    skip         only the blocks with standard attention are left
    skip_mixer   the other blocks lose their mixer and keep their MLP: x + mlp(norm(x))

"Deconstructing Attention" (arXiv 2510.11602) asks so whether the standard layers do all the work of a hybrid. Here
`skip` is without the whole blocks, `skip_mixer` without what takes the place of attention alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lazypipe.model.cache import RecurrentState
from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.base import BlockOutputs, TokenMixer
from lazypipe.model.mixers.registry import STANDARD
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import UserError
from lazypipe.stages.evaluate.config import Ablation


class NoMixer(TokenMixer):
    """Adds nothing to the residual stream and reads nothing."""

    def forward(self, x: Tensor, *_: object) -> BlockOutputs:
        return BlockOutputs(torch.zeros_like(x))

    def new_cache(self, max_tokens: int) -> RecurrentState:  # noqa: ARG002
        return RecurrentState()

    def attention_rows(self, x: Tensor, *_: object) -> None:  # noqa: ARG002
        return None


def refuse_uniform(config: ModelConfig) -> None:
    """UserError for a model without standard layers, of which `skip` leaves nothing, and for one without others."""
    mixers = config.layer_mixers
    if len(set(mixers)) < 2:
        raise UserError(
            f"ablations take out the layers that are not standard, but every layer of this model is {mixers[0]}; "
            "evaluate a hybrid (model.pattern), or set ablations: []"
        )


@contextmanager
def ablated(model: Transformer, ablation: Ablation) -> Iterator[Transformer]:
    """The model without its non-standard blocks or mixers while the context lasts; it is whole again afterwards.

    No weight is copied. UserError as by `refuse_uniform`.
    """
    refuse_uniform(model.config)
    mixers = model.config.layer_mixers
    whole, side = model.layers, model.side
    others = [layer for layer, mixer in zip(whole, mixers, strict=True) if mixer != STANDARD]
    taken = [layer.mixer for layer in others]
    try:
        model.side = None  # only the mixers that are gone read the side sequence
        if ablation == "skip":
            model.layers = nn.ModuleList(layer for layer in whole if layer not in others)
        else:
            for layer in others:
                layer.mixer = NoMixer()
        yield model
    finally:
        model.layers, model.side = whole, side
        for layer, mixer in zip(others, taken, strict=True):
            layer.mixer = mixer
