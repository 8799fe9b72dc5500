"""Protocols that ask questions of embeddings: few-shot and one-shot recognition, and open-set identification.

Scores (higher is more alike) are compared after rounding to the step of `siamese._walk.Levels`, 2^-20 on the unit sphere. Ties are
resolved against us: of equal scores, the different class ranks first.
"""

import math

import torch
from torch import Tensor
from torch.nn import Module

from siamese._walk import Levels, Ranks
from siamese.distances import scores

METHODS = ("prototype", "nearest")
RATES = (0.1, 0.01, 0.001)
_GATHERED = 2**17  # numbers in double precision that are copied out at a time: 1 MB, which stays in a processor's cache
_SCORES = 2**22  # computed at a time, if the gallery is no larger than that
_FEW = 4  # times the pairs that are asked about: where all pairs there are are no more, they are compared at once


@torch.no_grad()
def fewshot(
    embeddings: Tensor,
    labels: Tensor,
    distance: Module,
    ways: int,
    shots: int = 1,
    *,
    method: str = "prototype",
    episodes: int = 4_000,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Recognise a query's class among `ways` classes from `shots` examples of each (Lake et al. 2011; Vinyals et al. 2016).

    Each of `episodes` questions draws a query among the samples whose class has more than `shots`, `shots` other samples of its
    class, and `shots` samples of each of `ways - 1` other classes that have as many. It is answered right if the query's own
    class alone has the highest score. The questions follow from labels and seed, so that all models answer the same.

    Args:
        embeddings: float [N, D], finite.
        labels: int64 [N].
        method: "prototype" compares the query with the mean of a class's supports, of unit embeddings where the distance
            normalises (Snell, Swersky and Zemel 2017, arXiv:1703.05175), "nearest" with the most alike of them. Of one shot
            both are the same.

    Returns:
        right, bool [episodes], and classes, int64 [episodes]: the label of each query; both on the CPU.

    Raises:
        ValueError: no such method, senseless numbers, or fewer than `ways` classes with enough samples.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    if ways < 2 or shots < 1 or episodes < 1:
        raise ValueError(f"a question needs two ways, one shot and one episode at least, not {ways}, {shots} and {episodes}")
    labels = labels.cpu()
    query, support = _questions(labels, ways, shots, episodes, torch.Generator().manual_seed(seed))
    level = _levels(embeddings, query, support, distance, method)
    return (level[:, :1] > level[:, 1:]).all(1), labels[query]


@torch.no_grad()
def oneshot_by_ways(
    embeddings: Tensor, labels: Tensor, distance: Module, ways: list[int], *, episodes: int = 4_000, seed: int = 0
) -> list[float]:
    """The share of one-shot questions answered right, for each of these numbers of ways: questions of the most, and of their first classes.

    Args:
        embeddings, labels, episodes, seed: see `fewshot`.

    Raises:
        ValueError: fewer classes than the most ways, or no class with two samples.
    """
    generator = torch.Generator().manual_seed(seed)
    query, support = _questions(labels.cpu(), max(ways), 1, episodes, generator)
    level = _levels(embeddings, query, support, distance, "nearest")
    order = torch.rand(episodes, max(ways) - 1, generator=generator).argsort(1)  # every set is drawn equally often, but not every order
    best = level[:, 1:].gather(1, order).cummax(1).values  # of the other classes so far
    return [(level[:, 0] > best[:, number - 2]).double().mean().item() for number in ways]


def _levels(embeddings: Tensor, query: Tensor, support: Tensor, distance: Module, method: str) -> Tensor:
    """float64 [E, ways] on the CPU: rounded scores of the queries, rows int64 [E], with the classes of their supports [E, ways, shots]."""
    episodes, ways, shots = support.shape
    levels = Levels(distance, [embeddings], Ranks())
    if (shots == 1 or method == "nearest") and len(embeddings) ** 2 <= _FEW * support.numel():
        every = _ready(embeddings, levels)
        rows = every.split(max(1, _SCORES // every.numel()))
        level = torch.cat([(scores(distance, some, every) / levels.step).round_().cpu() for some in rows])
        return level[query[:, None, None], support].amax(2)
    size = max(1, _GATHERED // (ways * shots * embeddings.shape[1]))
    # Made beforehand: small tensors that stay between the large ones that go would keep the memory from being used again.
    found = torch.empty(episodes, ways, dtype=torch.float64)
    for queries, supports, level in zip(query.split(size), support.split(size), found.split(size), strict=True):
        asked, shown = (_ready(embeddings[rows.to(embeddings.device)], levels) for rows in (queries, supports))
        if method == "prototype" and shots > 1:
            shown = distance.maybe_normalize(shown.flatten(0, 2)).view_as(shown).mean(2, keepdim=True)
        level.copy_((levels.each(asked, shown.flatten(1, 2)) / levels.step).round_().view(shown.shape[:3]).amax(2))
    return found


def _questions(labels: Tensor, ways: int, shots: int, episodes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of the queries, int64 [E], and of their supports, int64 [E, ways, shots], those of the query's class first."""
    _, member, counts = labels.unique(return_inverse=True, return_counts=True)
    classes, able = (counts >= shots).nonzero().flatten(), (counts[member] > shots).nonzero().flatten()
    if len(classes) < ways or len(able) == 0:
        raise ValueError(
            f"{ways}-way {shots}-shot questions need {ways} classes with {shots} samples, one of them with {shots + 1}: of "
            f"{len(counts)} classes {len(classes)} have {shots}, {int((counts > shots).sum())} have {shots + 1}"
        )
    order = member.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    first = counts.cumsum(0) - counts

    query = able[_draw(torch.full((episodes,), len(able)), 1, generator).flatten()]
    own = member[query]
    # Others than one's own are drawn by how far they are behind it, going around.
    further = _draw(torch.full((episodes,), len(classes) - 1), ways - 1, generator)
    others = classes[(torch.searchsorted(classes, own)[:, None] + 1 + further) % len(classes)]
    chosen = torch.cat([own[:, None], others], 1)
    available = counts[chosen]
    available[:, 0] -= 1
    within = _draw(available, shots, generator)
    within[:, 0] = ((place[query] - first[own])[:, None] + 1 + within[:, 0]) % counts[own, None]
    return query, order[first[chosen][..., None] + within]


def _draw(below: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """For each n of `below`, `number` different integers of 0 ... n - 1, every set of them equally likely: [...] -> [..., number].

    By Floyd's algorithm (Bentley and Floyd 1987, "A sample of brilliance"), in time and memory that do not grow with n.
    """
    drawn = below.new_full((*below.shape, number), -1)
    for i in range(number):
        last = below - number + i
        one = (torch.rand(below.shape, generator=generator, dtype=torch.float64) * (last + 1)).long()
        drawn[..., i] = torch.where((drawn == one[..., None]).any(-1), last, one)
    return drawn


def _ready(embeddings: Tensor, levels: Levels, dtype: torch.dtype = torch.float64) -> Tensor:
    """In this precision, and moved to the centre where this changes no distance but makes its rounding smaller."""
    return embeddings.to(dtype) if levels.centre is None else embeddings.to(dtype) - levels.centre


@torch.no_grad()
def oneshot_error(runs: list[tuple[Tensor, Tensor, Tensor]], distance: Module) -> float:
    """Error in percent over official one-shot runs (Lake, Salakhutdinov and Tenenbaum 2015).

    Args:
        runs: (queries [Q, D], supports [S, D], the row of each query's own support, int64 [Q]).
    """
    wrong = total = 0
    for queries, supports, answer in runs:
        levels = Levels(distance, [queries, supports], Ranks())
        level = (scores(distance, _ready(queries, levels), _ready(supports, levels)) / levels.step).round_()
        own = level.gather(1, answer[:, None].to(level.device))
        wrong += int(((level >= own).sum(1) > 1).sum())
        total += len(queries)
    return 100 * wrong / total


@torch.no_grad()
def identify(
    probes: Tensor,
    labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    distance: Module,
    rates: tuple[float, ...] = RATES,
) -> tuple[dict[str, float], list[str]]:
    """Open-set identification (Phillips, Grother and Micheals 2011, Handbook of Face Recognition; ISO/IEC 19795-1).

    A probe is enrolled if the gallery has its class, otherwise a stranger.

    Args:
        probes, gallery: float [P, D] and [G, D], finite.
        labels, gallery_labels: int64 [P] and [G].
        rates: false-alarm rates, each above 0 and at most 1.

    Returns:
        figures, in 0..1: rank_1_identification, the share of enrolled probes whose best score is of their own class, and for each
        rate dir_at_far_1e1 ... 1e3, the share for which it reaches the threshold too: the most lenient at which at most that
        share of strangers has any score that reaches it. And notes: why a rate is left out, one sentence each.

    Raises:
        ValueError: no probe is enrolled, or none is a stranger, or a rate is out of range.
    """
    if not all(0 < rate <= 1 for rate in rates):
        raise ValueError(f"false-alarm rates are above 0 and at most 1, not {', '.join(map(str, rates))}")
    labels, gallery_labels = labels.to(probes.device), gallery_labels.to(probes.device)
    enrolled = torch.isin(labels, gallery_labels)
    strangers = int((~enrolled).sum())
    if strangers in (0, len(labels)):
        raise ValueError(f"of {len(labels):,} probes {strangers:,} are strangers to the gallery: there must be enrolled ones and strangers")
    return _at_rates(*_answers(probes, labels, gallery, gallery_labels, enrolled, distance), rates)


@torch.no_grad()
def open_set(embeddings: Tensor, labels: Tensor, distance: Module, seed: int = 0) -> tuple[dict[str, float], list[str], Tensor]:
    """Open-set identification from one sample of each of half of the classes; the other half are strangers.

    Half of the classes with two samples or more, at most 1,000 of them, and their samples are drawn from labels and seed; of all other
    samples at most 10,000 are probes.

    Args:
        embeddings: float [N, D], finite.
        labels: int64 [N].

    Returns:
        the figures and notes of `identify`, and a curve, float64 [<= 200, 2]: false-alarm rate, detection and identification rate.

    Raises:
        ValueError: there are no two classes with two samples.
    """
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draw).to(labels.device)
    kinds, member, counts = labels[order].unique(return_inverse=True, return_counts=True)
    able = (counts > 1).nonzero().flatten().cpu()
    if len(able) < 2:
        raise ValueError(f"open-set identification needs two classes with two samples, of {len(kinds)} classes {len(able)} have them")
    first = torch.full_like(counts, len(order)).scatter_reduce_(0, member, torch.arange(len(order), device=labels.device), "amin")
    chosen = able[torch.randperm(len(able), generator=draw)[: min(len(able) // 2, 1000)]].to(labels.device)
    kept = torch.ones(len(order), dtype=torch.bool, device=labels.device)
    kept[first[chosen]] = False
    gallery, probes = order[first[chosen]], order[kept]
    # Of many samples as many of those that are enrolled as of strangers.
    known = torch.isin(labels[probes], labels[gallery])
    probes, known = (torch.cat([part[known][:5000], part[~known][:5000]]) for part in (probes, known))
    own, right, alarms = _answers(embeddings[probes], labels[probes], embeddings[gallery], labels[gallery], known, distance)
    figures, notes = _at_rates(own, right, alarms, RATES)
    allowed = torch.logspace(0, -math.log10(len(alarms)), 200, dtype=torch.float64).mul(len(alarms)).long().unique()
    refused = torch.cat([alarms, alarms.new_full((1,), -torch.inf)])[allowed.to(alarms.device)]
    detected = (right & (own > refused[:, None])).double().mean(1)
    return figures, notes, torch.stack([allowed.to(alarms.device) / len(alarms), detected], 1).cpu()


def _answers(
    probes: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, enrolled: Tensor, distance: Module
) -> tuple[Tensor, Tensor, Tensor]:
    """Of those enrolled the level of their own class and whether it is the best; of strangers the best levels, highest first."""
    own, other = _best(probes, labels, gallery, gallery_labels, distance)
    return own[enrolled], (own > other)[enrolled], other[~enrolled].sort(descending=True).values


def _at_rates(own: Tensor, first: Tensor, alarms: Tensor, rates: tuple[float, ...]) -> tuple[dict[str, float], list[str]]:
    strangers = len(alarms)
    figures, notes = {"rank_1_identification": first.double().mean().item()}, []
    for rate in rates:
        mantissa, exponent = f"{rate:e}".split("e")
        name, expected = f"dir_at_far_{float(mantissa):g}e{-int(exponent)}", round(rate * strangers, 6)  # 0.29 * 100 < 29
        if expected < 10:
            notes.append(f"{name} is left out: {strangers:,} strangers give {expected:.2g} expected false alarms, ten are needed")
            continue
        # The threshold lies just above the first stranger that must not reach it, if there is one.
        refused = alarms[int(expected)] if expected < strangers else -torch.inf
        figures[name] = (first & (own > refused)).double().mean().item()
    return figures, notes


def _best(probes: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, distance: Module) -> tuple[Tensor, Tensor]:
    """The highest level of each probe with its own class and with the others, float64 [P] each; -inf where there is none."""
    levels = Levels(distance, [probes, gallery], Ranks())
    found = []
    size = max(1, _SCORES // max(gallery.shape))
    gallery = _ready(gallery, levels, levels.dtype)
    for rows, of in zip(probes.split(size), labels.split(size), strict=True):
        level = (scores(distance, _ready(rows, levels, levels.dtype), gallery) / levels.step).round_()
        same = of[:, None] == gallery_labels
        found.append(torch.stack([level.masked_fill(~same, -torch.inf).amax(1), level.masked_fill_(same, -torch.inf).amax(1)]))
    own, other = torch.cat(found, 1).double()
    return own, other
