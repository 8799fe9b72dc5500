"""Learning-rate schedules that torch does not have in one piece."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.1) -> LambdaLR:
    """Up in a line to each group's own learning rate, then down to 0 along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983).

    Unlike torch's OneCycleLR it leaves momentum alone and starts near 0, as is usual for transformers and fine-tuning.

    Args:
        optimizer: its groups' learning rates are the peaks.
        total_steps: of the run.
        warmup: the share of them until the peak.

    Raises:
        ValueError: `warmup` is not within 0..1.
    """
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup={warmup} is a share of the run's steps: say a number from 0 to 1, such as 0.1")
    rising = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return (1 + math.cos(math.pi * (step - rising) / max(total_steps - rising, 1))) / 2

    return LambdaLR(optimizer, factor)
