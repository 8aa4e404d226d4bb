"""What is minimised."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy, in float32: logits (N, classes) of any float dtype, labels int64 (N,) or shares (N, classes) -> ().

    With `smoothing`, that share of each target is spread evenly over all classes (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
