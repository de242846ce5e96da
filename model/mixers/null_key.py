"""A key that every query sees and that carries no value: one more term in the denominator of the softmax."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lazypipe.model.mixers.standard import visible

# Two columns carry the logit; eight keep a head width that is a multiple of 8, which the fused CUDA kernels ask for.
LOGIT_COLUMNS = 8


def attend_with_null_key(
    q: Tensor, k: Tensor, v: Tensor, scale: float, logit: Tensor | None = None, with_mass: bool = False
) -> Tensor:
    """sum_{j <= i} exp(s_ij) v_j / (exp(logit) + sum_{j <= i} exp(s_ij)), s = scale q . k; [B, H, Lq, D].

    q [B, H, Lq, D] are the last Lq positions of k, v [B, Hkv, Lk, D]; logit [H] float32, 0 when None. One call of
    torch's fused attention over Lk + 1 keys, so no [Lq, Lk] matrix is kept where torch has a kernel without one.

    The null key is the zero vector, hence of logit 0. Another logit takes two more columns, one on the queries and as
    many ones on the null key: the logit / scale rounded to bfloat16, and the rest, so that 16 bits of it survive a
    kernel that runs in bfloat16.

    with_mass (beside a logit): one more column, [B, H, Lq, D + 1]: the weight all real keys have together,
    sigmoid(logsumexp_j(s_ij) - logit). It comes out of the same call, as a value of 1 in the padding.
    """
    assert logit is not None or not with_mass
    query_len, key_len = q.shape[2], k.shape[2]
    null_key = k.new_zeros(k.shape[0], k.shape[1], 1, k.shape[3])
    head_dim = v.shape[3]
    if logit is not None:
        whole = logit.float() / scale
        rounded = whole.detach().bfloat16().float()
        columns = F.pad(torch.stack((rounded, whole - rounded), dim=-1), (0, LOGIT_COLUMNS - 2))
        q = torch.cat((q, columns.to(q.dtype)[None, :, None].expand(q.shape[0], -1, query_len, -1)), dim=-1)
        k = F.pad(k, (0, LOGIT_COLUMNS))
        v = F.pad(F.pad(v, (0, 1), value=float(with_mass)), (0, LOGIT_COLUMNS - 1))
        null_key = F.pad(F.pad(null_key, (0, 2), value=1.0), (0, LOGIT_COLUMNS - 2))
    k = torch.cat((null_key, k), dim=2)
    v = F.pad(v, (0, 0, 1, 0))
    grouped = q.shape[1] != k.shape[1]
    if query_len == key_len:
        # A query in front, dropped again, puts every other query opposite its own key: torch's causal mask then fits.
        q = F.pad(q, (0, 0, 1, 0))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)[:, :, 1:]
    else:
        mask = None
        if query_len > 1:
            mask = F.pad(visible(query_len, key_len, q.device), (1, 0), value=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out[..., : head_dim + with_mass]


def weights_beside_null_key(scores: Tensor, logit: Tensor) -> Tensor:
    """The weights of the real keys, [B, H, Lq, Lk] like scores float32 (not yet masked); logit [H] or [1] float32."""
    query_len, key_len = scores.shape[2:]
    masked = scores.masked_fill(~visible(query_len, key_len, scores.device), -torch.inf)
    null = logit.float()[:, None, None].expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat((null, masked), dim=-1), dim=-1)[..., 1:]
