"""Softmax off by one (Miller 2023, "Attention Is Off By One"): a head may attend to nothing."""

from torch import Tensor

from lazypipe.model.mixers.base import AttentionMixer
from lazypipe.model.mixers.null_key import attend_with_null_key, weights_beside_null_key


class Softmax1Attention(AttentionMixer):
    """o_i = sum_{j <= i} exp(s_ij) v_j / (1 + sum_{j <= i} exp(s_ij)): softmax beside a key of logit 0 and no value."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_with_null_key(q, k, v, self.scale)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        scores = self.scores(q, k)
        return weights_beside_null_key(scores, scores.new_zeros(1))
