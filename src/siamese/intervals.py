"""95 % intervals that respect that samples of a class, and pairs that share a sample, are not independent.

What varies from one test set to another like it is which classes are in it. So classes are the units: of each, its influence on a
figure is computed (how the figure would move if the class counted a little more), and the squares of these are added up, the
infinitesimal jackknife over classes (Efron 1982, The jackknife, the bootstrap and other resampling plans; for the area under the
ROC with clusters Obuchowski 1997, Biometrics 53). Intervals are symmetric on the scale of log(p / (1 - p)), so that they stay
within 0..1 and lean as the figures near 1 do.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import Module

from siamese._walk import Found, Levels, Ranks, part_of

_CLASSES, _ROWS = 1000, 4096  # looked at for the figures of pairs: of more, a seeded sample tells the variance well enough


def interval(value: float, influences: Tensor, classes: int) -> list[float]:
    """[low, high] of a rate in 0..1.

    Args:
        value: the figure.
        influences: float [c] of the classes looked at, which are all or a random sample of them.
        classes: how many there are.
    """
    if not 0 < value < 1 or classes < 2:  # no class disagrees: so many agree by chance one time in forty
        bound = 0.025 ** (1 / max(classes, 1))
        return [0.0, 1.0] if classes < 2 or 0 < value < 1 else [bound, 1.0] if value >= 1 else [0.0, 1 - bound]
    squares = influences.double().square()
    variance = classes / (classes - 1) * classes / len(influences) * squares.sum().item()
    # A variance that a few classes make is known as badly as one of few classes (Satterthwaite 1946, with their kurtosis).
    kurtosis = (len(squares) * squares.square().sum() / squares.sum().square().clamp(min=1e-300)).item()
    freedom = min(len(squares) - 1, 2 * len(squares) / max(kurtosis - 1, 1e-9))
    reach = _t_quantile(freedom) * math.sqrt(variance) / (value * (1 - value))
    middle = math.log(value / (1 - value))
    return [1 / (1 + math.exp(min(-middle + side * reach, 700))) for side in (1, -1)]


def mean_interval(values: Tensor, labels: Tensor) -> list[float]:
    """Of the mean of one value per query or question, float [Q] in 0..1, with their classes, int64 [Q]."""
    values, inverse = values.double(), labels.unique(return_inverse=True)[1]
    mean = values.mean()
    influences = torch.zeros(int(inverse.max()) + 1, dtype=torch.float64, device=values.device)
    influences.index_add_(0, inverse, (values - mean) / len(values))
    return interval(mean.item(), influences, len(influences))


@torch.no_grad()
def pair_intervals(found: Found, figures: dict, embeddings: Tensor, labels: Tensor, distance: Module, seed: int = 0) -> dict:
    """Intervals of `auc`, `eer`, and of `far` and `frr` at the threshold, of all pairs of one set, which the walk has found.

    Args:
        figures: auc, eer and threshold.
        embeddings: float [N, D]; labels: int64 [N].
        seed: of the classes, and of their samples, that are looked at: of more than 1,000, or 4,096 in all, not all are.
    """
    device = labels.device
    levels = Levels(distance, [embeddings], Ranks())
    part = part_of(embeddings, labels, levels)
    counts = part.labels.unique_consecutive(return_counts=True)[1].cpu()
    first, generator = counts.cumsum(0) - counts, torch.Generator().manual_seed(seed)
    classes = torch.randperm(len(counts), generator=generator)[:_CLASSES]
    most = max(_ROWS // len(classes), 2)
    rows = [first[c] + torch.randperm(int(counts[c]), generator=generator)[:most] for c in classes.tolist()]
    owner = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(one) for one in rows])).to(device)
    weight = (counts[classes] / torch.tensor([len(one) for one in rows])).double().to(device)

    # By the level of a pair: the share of same pairs above it, of different pairs below it, equal ones half.
    same, different = found.same.flip(0) / found.same.sum(), found.different.flip(0) / found.different.sum()
    start = (found.score.flip(0) / found.step).round().long() - int(levels.empty)
    length = torch.diff(start, append=start.new_tensor([levels.count]))
    length[0] += start[0]
    above = (1 - same.cumsum(0) + same / 2).float().repeat_interleave(length)
    below = (different.cumsum(0) - different / 2).float().repeat_interleave(length)
    far, miss = found.different.cumsum(0) / found.different.sum(), 1 - found.same.cumsum(0) / found.same.sum()
    auc, eer = figures["auc"], figures["eer"]
    reached = int((found.score >= figures["threshold"] - found.step / 2).sum()) - 1
    cuts = sorted({int((far >= miss).int().argmax()), max(reached, 0)})  # of equal error, and of the threshold
    thresholds, far, miss = (found.score[cuts] / found.step).tolist(), far.cpu(), miss.cpu()

    names = ("above", "below", *((kind, cut) for cut in cuts for kind in ("far", "miss")))
    sums = {name: torch.zeros(len(classes), dtype=torch.float64, device=device) for name in names}
    rows, place = torch.cat(rows).to(device), torch.arange(len(labels), device=device)
    for some, whose in zip(rows.split(256), owner.split(256), strict=True):
        left = levels.left(replace(part, order=part.order[some]), 0, len(some)).clone()
        for c in range(0, len(labels), 4096):
            d = min(c + 4096, len(labels))
            block = levels.between(left, levels.right(part, c, d)).round_()
            alike, itself = part.labels[some][:, None] == part.labels[c:d], some[:, None] == place[c:d]
            number = (block - levels.empty).int()
            one = above.index_select(0, number.view(-1)).view(block.shape).masked_fill_(alike, 0)
            sums["above"].index_add_(0, whose, one.sum(1, dtype=torch.float64) - auc * (~alike).sum(1))
            y, x = (alike & ~itself).nonzero().unbind(1)
            sums["below"].index_add_(0, whose[y], below[number[y, x]].double() - auc)
            for cut, threshold in zip(cuts, thresholds, strict=True):
                accepted = block >= threshold
                sums["far", cut].index_add_(0, whose, (accepted & ~alike).sum(1).double() - far[cut].item() * (~alike).sum(1))
                sums["miss", cut].index_add_(0, whose[y], (~accepted[y, x]).double() - miss[cut].item())
    pairs = {"above": found.different.sum(), "far": found.different.sum(), "below": 2 * found.same.sum(), "miss": 2 * found.same.sum()}
    moved = {name: weight * total / pairs[name if isinstance(name, str) else name[0]] for name, total in sums.items()}
    crossing = int((far >= miss).int().argmax())
    # The equal error lies where the curve, of this slope there, meets the diagonal.
    near = [int(torch.searchsorted(far, eer * share).clamp(max=len(far) - 1)) for share in (0.8, 1.25)]
    slope = float((miss[near[0]] - miss[near[1]]) / (far[near[1]] - far[near[0]]).clamp(min=1e-12))
    return {
        "auc": interval(auc, moved["above"] + moved["below"], len(counts)),
        "eer": interval(eer, (slope * moved["far", crossing] + moved["miss", crossing]) / (slope + 1), len(counts)),
        "far": interval(figures["far"], moved["far", max(reached, 0)], len(counts)),
        "frr": interval(figures["frr"], moved["miss", max(reached, 0)], len(counts)),
    }


def _t_quantile(freedom: float) -> float:
    """Of Student's distribution at 97.5 %, by the expansion of Cornish and Fisher: within 0.3 % from 5 degrees of freedom up."""
    z, n = 1.959964, max(freedom, 1)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / n**power for power, term in enumerate(terms, 1))
