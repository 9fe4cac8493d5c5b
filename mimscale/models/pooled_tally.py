"""What pooling and the linear layer of `mimscale.models.pooled` add to an encoder, counted. Without torch.

L tokens of a crop | D numbers of a token | K outputs
"""

from typing import Literal

from mimscale.models.config import POOL_DIM
from mimscale.models.tally import Tally, linear


def pooled_head(tokens: int, dim: int, outputs: int, pool: Literal["mean", "attention"]) -> Tally:
    """L tokens of D numbers -> K."""
    head = linear("head", 1, dim, outputs)
    if pool == "mean":
        return head
    # Kept: tokens in fp32 too, what looks at them, and their shares before and behind the softmax.
    kept = Tally(numbers=tokens * POOL_DIM, fp32=tokens * (dim + 2), narrowed=tokens * dim)
    view = linear("head", tokens, dim, POOL_DIM)
    return view + linear("head", tokens, POOL_DIM, 1, bias=False) + kept + head
