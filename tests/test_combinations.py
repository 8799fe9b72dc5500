"""The table of what goes with what: all that it allows learns, all that it does not is refused with a way out."""

import copy
import functools
import itertools
import math
import re

import hydra
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from sklearn.metrics import roc_auc_score

from siamese.bundle import Bundle
from siamese.config import CONF, InputError, available, build, check, compose, partial, rates, resolve
from siamese.data.glyphs import Glyphs
from siamese.data.samples import Samples
from siamese.distances import scores
from siamese.losses import CrossBatchMemory
from siamese.module import SiameseModule

LOSSES, MINERS, SAMPLINGS = available("loss"), available("miner"), ("balanced", "pairs", "triplets")
DISTANCES = ("cosine", "euclidean", "euclidean distance.normalize_embeddings=false", "learned")
PLAIN = DISTANCES[2]

# Written from the losses' papers and from how pytorch-metric-learning forms their tuples, not from the YAML.
# A pair alone, positive or negative, says something to these; the others compare a positive with negatives of its anchor.
FROM_PAIRS = {"bce", "contrastive", "multi_similarity"}
# These learn from the classes of a batch: by trained proxies of the classes, by the ranking of a whole batch, or by its memory.
FROM_CLASSES = {
    *("arcface", "cosface", "sub_center_arcface", "sphereface", "normalized_softmax", "soft_triple", "proxy_nca", "proxy_anchor", "sum"),
    *("nca", "fast_ap", "smooth_ap", "ranked_list", "angular", "n_pairs", "xbm"),
}
# Their margins, or no margins at all, make sense for any distance; softmaxes of distances need only one that is bounded in scale.
ANY_DISTANCE = {"bce", "contrastive", "lifted_structure", "margin", "multi_similarity", "triplet", "xbm"}
SOFTMAX_OF_PAIRS = {"n_pairs", "nca", "ntxent", "supcon"}
OWN_TUPLES = {"ranked_list"}
MINES_ON_THE_SPHERE = {"angular", "distance_weighted"}


def refused(loss: str, sampling: str, distance: str) -> set[str]:
    wrong = set()
    if (sampling == "pairs" and loss not in FROM_PAIRS) or (sampling == "triplets" and loss in FROM_CLASSES):
        wrong.add("sampling")
    if distance == PLAIN and loss not in ANY_DISTANCE:
        wrong.add("distance")
    if distance == "learned" and loss not in ANY_DISTANCE | SOFTMAX_OF_PAIRS:
        wrong.add("distance")
    return wrong


def mines(loss: str, miner: str, distance: str) -> bool:
    return not (loss in OWN_TUPLES and miner != "none") and not (miner in MINES_ON_THE_SPHERE and distance in (PLAIN, "learned"))


EVERYTHING = list(itertools.product(LOSSES, SAMPLINGS, DISTANCES))
ALLOWED = [combination for combination in EVERYTHING if not refused(*combination)]


@functools.cache
def by_hydra(*overrides: str) -> tuple[DictConfig, dict[str, str]]:
    """What these overrides, all of one group, come to, unchecked, and the choices; it is seen that they say nothing of other groups."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("train", list(overrides), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    if overrides:
        own, default = (OmegaConf.to_container(node, resolve=False) for node in (cfg, by_hydra()[0]))
        assert [key for key in own if own[key] != default[key]] in ([], [group_of(overrides[0])])
    return cfg, choices


def group_of(override: str) -> str:
    return re.match(r"\w+", override)[0]


@functools.cache
def composed(*overrides: str) -> dict:
    """As `compose`; but Hydra, which takes a fifth of a second, composes the choices of each group by itself, once."""
    words = " ".join(overrides).split()
    cfg, choices = copy.deepcopy(by_hydra())
    for group in dict.fromkeys(map(group_of, words)):
        own, chosen = by_hydra(*(word for word in words if group_of(word) == group))
        cfg[group] = own[group]
        choices.update({key: choice for key, choice in chosen.items() if group_of(key) == group})
    return check(cfg, choices, [], "train")


# --- the check


def advice(message: str) -> list[str]:
    """The overrides that a refusal proposes: all that stand after "use"."""
    return re.findall(r"[\w@.]+=\w+", re.split(r"\b[Uu]se\b", message, maxsplit=1)[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_what_goes_together_composes_and_the_rest_is_refused_with_a_way_out(loss):
    tried: dict[tuple[str, ...], bool] = {}

    def passes(*command: str) -> bool:
        if command not in tried:
            try:
                tried[command] = composed(*command)["choices"]["loss"] in command[0]
            except InputError:
                tried[command] = False
        return tried[command]

    for sampling, distance in itertools.product(SAMPLINGS, DISTANCES):
        wrong, command = refused(loss, sampling, distance), (f"loss={loss}", f"sampling={sampling}", f"distance={distance}")
        if not wrong:
            assert passes(*command), command
            continue
        with pytest.raises(InputError) as error:
            composed(*command)
        message = str(error.value)
        assert message.count("\n") == 0
        assert any(f"{group}=" in re.split(r"\b[Uu]se\b", message)[0] for group in wrong), f"names none of {wrong}: {message}"
        if len(wrong) > 1:
            continue  # the way out of the first refusal leads to the second
        assert advice(message), message
        for override in advice(message):
            group = override.partition("=")[0]
            kept = [part for part in " ".join(command).split() if part.partition("=")[0].partition(".")[0] != group]
            assert composed(*kept, override), f"{message}: {override}"


@pytest.mark.parametrize("miner", MINERS)
def test_a_miner_that_is_not_defined_for_a_distance_is_refused_where_it_would_be_used(miner):
    for distance in DISTANCES:
        command = ("loss=contrastive", f"miner={miner}", f"distance={distance}")
        if mines("contrastive", miner, distance):
            assert composed(*command)["choices"]["miner"] == miner
        else:
            with pytest.raises(InputError, match=f"miner={miner} is not defined for distance="):
                composed(*command)
            assert composed(*command, "sampling=pairs"), "where the batches bring their tuples, no miner is used"


def test_a_loss_that_weighs_all_pairs_itself_takes_no_miner():
    for loss in OWN_TUPLES:
        with pytest.raises(InputError, match=f"loss={loss} forms its own tuples and takes none from miner=hard: use miner=none"):
            composed(f"loss={loss}", "miner=hard")


WRAPPED = {"angular", "circle", "contrastive", "lifted_structure", "margin", "multi_similarity", "nca", "ntxent", "supcon", "triplet"}
WRAPPED |= {"tuplet_margin", "bce"}


def test_a_memory_goes_around_the_losses_that_pytorch_metric_learning_says_and_no_other():
    for loss in sorted(set(LOSSES) - {"xbm", "sum", "threshold_consistent"}):
        if loss in WRAPPED:
            assert composed("loss=xbm", f"loss@loss.loss={loss}")["loss"]["loss"]
        else:
            with pytest.raises(InputError, match=f"loss=xbm does not go around loss={loss}: use") as error:
                composed("loss=xbm", f"loss@loss.loss={loss}")
            assert composed("loss=xbm", advice(str(error.value))[-1])


def test_what_is_within_a_loss_or_miner_is_held_against_the_table_too():
    for command, culprit in [
        ("loss=xbm loss@loss.loss=circle distance=learned", "loss@loss.loss=circle"),
        ("loss=sum distance=learned", "loss@loss.losses.second=arcface"),
        ("loss=threshold_consistent sampling=pairs", "loss@loss.losses.base=supcon"),
        ("miner=scheduled miner@miner.stages.late=distance_weighted distance=learned", "miner@miner.stages.late=distance_weighted"),
    ]:
        with pytest.raises(InputError, match=re.escape(culprit)):
            compose(command.split())
    compose(["loss=sum", "loss@loss.losses.second=bce", "distance=learned"])


# --- a few steps of everything


@pytest.fixture(scope="module")
def letters() -> Samples:
    """The first forty letters of training."""
    samples = Glyphs().split("train")
    few = samples.labels < 40
    ids = [i for i, kept in zip(samples.ids, few.tolist(), strict=True) if kept]
    return Samples(samples.inputs[few], samples.labels[few], samples.class_names[:40], ids)


def assembled(letters: Samples, loss: str, sampling: str, distance: str, miner: str) -> tuple[SiameseModule, list]:
    """What train.py builds of a configuration, with a small encoder, and the batches of its first epoch."""
    config = {
        **composed(f"loss={loss}", f"distance={distance}"),
        "miner": composed("loss=contrastive", f"miner={miner}", f"distance={distance}")["miner"],
    }
    torch.manual_seed(0)
    encoder = {"_target_": "siamese.encoders.MLP", "input_shape": [1, 32, 32], "hidden": [64], "embedding_size": 16}
    model = Bundle(
        {"encoder": encoder, "distance": resolve(config, "distance"), "preprocessing": {"_target_": "siamese.bundle.Standardize"}}
    )
    chosen = build(config, "miner", distance=model.distance)
    assert (chosen is None) == (miner == "none")
    objective = build(config, "loss", num_classes=40, embedding_size=16, distance=model.distance, miner=chosen)
    if isinstance(objective, CrossBatchMemory):
        assert objective.miner is chosen
        chosen = None
    sizes = {"balanced": ["sampling.classes=16"], "pairs": ["loss=contrastive"], "triplets": []}[sampling]
    loader = partial(composed(f"sampling={sampling}", *sizes), "sampling")(samples=letters, seed=0)
    module = SiameseModule(model, objective, chosen, optimizer=partial(config, "optimizer"), rates=rates(config))
    return module, list(loader)


def trained(module: SiameseModule, batches: list, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient of the encoder) of each step."""
    optimizer, seen = module.configure_optimizers(), []
    for batch in itertools.islice(itertools.cycle(batches), steps):
        embeddings = module.model(batch.inputs)
        loss = module.loss(embeddings, batch.labels, module.tuples(batch, embeddings))
        optimizer.zero_grad()
        loss.backward()
        norms = [p.grad.norm().item() for p in module.model.encoder.parameters() if p.grad is not None]
        seen.append((loss.item(), math.hypot(*norms)))
        optimizer.step()
    return seen


# With the miner's margin equal to the loss's, what the miner calls easy is what the loss calls solved.
SOLVED = {("triplet", "easy")}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_with_every_miner(letters, loss):
    """Its distances take turns, so that each two of loss, miner and distance that go together meet."""
    distances = [distance for distance in DISTANCES if not refused(loss, "balanced", distance)]
    met = set()
    for turn, miner in enumerate(sorted(MINERS, key=lambda miner: miner not in MINES_ON_THE_SPHERE), LOSSES.index(loss)):
        mined = [distance for distance in distances if mines(loss, miner, distance)]
        if not mined:
            continue
        distance = mined[turn % len(mined)]
        module, batches = assembled(letters, loss, "balanced", distance, miner)
        seen = trained(module, batches, 3)
        assert all(math.isfinite(value) and math.isfinite(norm) for value, norm in seen), f"miner={miner} distance={distance}: {seen}"
        if (loss, miner) not in SOLVED:
            assert any(norm > 0 for _, norm in seen), f"miner={miner} distance={distance}: no gradient in {seen}"
        met.add(distance)
    assert met == set(distances) or loss in OWN_TUPLES


@pytest.mark.parametrize("wrapped", sorted(WRAPPED))
def test_a_memory_trains_around_every_loss_that_it_takes_with_every_kind_of_miner(letters, wrapped):
    for miner in ("none", "semihard", "multi_similarity", "distance_weighted", "scheduled"):
        module, batches = assembled(letters, f"xbm loss@loss.loss={wrapped}", "balanced", "cosine", miner)
        seen = trained(module, batches, 3)
        assert all(math.isfinite(value) and math.isfinite(norm) for value, norm in seen), f"miner={miner}: {seen}"
        assert any(norm > 0 for _, norm in seen), f"miner={miner}: no gradient in {seen}"


@pytest.mark.parametrize(("loss", "sampling", "distance"), ALLOWED)
def test_everything_that_is_allowed_learns(letters, loss, sampling, distance):
    module, batches = assembled(letters, loss, sampling, distance, "none")
    judged = letters[torch.arange(0, len(letters), 3)] if sampling == "balanced" else batches[0]

    def separation() -> float:
        with torch.no_grad():
            embedded = module.model.train()(judged.inputs)
            found = scores(module.model.distance, embedded, embedded)
        same = judged.labels[:, None] == judged.labels
        return roc_auc_score(same.flatten(), found.flatten())

    before = separation()
    seen = trained(module, batches, 20)
    assert all(math.isfinite(value) and math.isfinite(norm) for value, norm in seen), seen
    assert sum(norm > 0 for _, norm in seen) > 10, seen  # a batch whose tuples are all solved has no gradient
    assert separation() > before + 0.03
