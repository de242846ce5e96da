"""Stick-breaking attention (Tan et al. 2024, arXiv 2410.17980): the nearest keys take their share first."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.mixers.costs import QUERY_ROWS
from lazypipe.model.mixers.query_blocks import RowwiseAttention, zero_share
from lazypipe.model.mixers.standard import visible


class StickBreakingAttention(RowwiseAttention):
    """o_i = sum_{j < i} A_ij v_j with A_ij = sigma(s_ij) prod_{j < k < i} (1 - sigma(s_ik)), q and k unrotated.

    Order gives position, so there is no encoding of it. A query does not see its own key: the first row is 0. What the
    keys leave of the stick, prod_{k < i} (1 - sigma(s_ik)), is dropped, or goes to v_i with
    config.stick_breaking_remainder; rows then sum to 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.remainder = config.stick_breaking_remainder

    def queries_and_keys(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return self.unrotated(x)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        scores = self.scores(q, k)
        query_len, key_len = scores.shape[2:]
        seen = visible(query_len, key_len, q.device)
        earlier = seen.tril(key_len - query_len - 1)
        left_over = F.logsigmoid(-scores).masked_fill(~earlier, 0.0)
        # Sum over j <= k < i, from the query backwards; shifted by one it is the sum over j < k < i, with no rounding
        # of a difference in it.
        broken = left_over.flip(-1).cumsum(-1).flip(-1)
        between = F.pad(broken[..., 1:], (0, 1))
        weights = torch.exp(F.logsigmoid(scores) + between).masked_fill(~earlier, 0.0)
        if self.remainder:
            weights = torch.where(seen & ~earlier, broken[..., :1].exp(), weights)
        return weights

    def sparsity(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        return zero_share(self.attention_rows(x, inputs, QUERY_ROWS), inputs.documents)
