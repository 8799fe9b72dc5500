"""Judge a model on classes it has never seen, and set the rows beside it that tell an easy data set from a good model."""

import re
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import Progress

from siamese.bundle import Bundle
from siamese.data.samples import Samples
from siamese.decision import Decision, goal_rate, rounded_up
from siamese.evaluation import EvaluationResult, evaluate, evaluate_tuples
from siamese.protocols import oneshot_error
from siamese.reporting import keep

_FITTED = ("threshold", "accuracy", "far", "frr", "calibration_error", "f1", "f1_threshold")


def judge(
    model: Bundle, data, test: bool = True, goal: str = "equal_error", shown: bool = False, last: bool = False
) -> dict[str, EvaluationResult]:
    """`val`, and with `test` also `test`, whose accuracy uses the threshold that was fitted on `val`.

    Where `val` is of classes that are trained on, neither it is given nor what goes by its threshold.

    Args:
        model: its decision is set to the one fitted on validation, or to None. It embeds, and its embeddings are compared, on its device.
        data: has `val`, `test` and `source`, as `SiameseData` does.
        test: False never touches the test split.
        goal: of the threshold, see `siamese.decision.goal_rate`.
        shown: of the last split, samples to look at are kept in the result, see `siamese.reporting.keep`.
        last: only the last split is given, and of the other no more is found out than its threshold.
    """
    results, decision, f1_threshold = {}, None, None
    known = "val" in data.source.trained_on
    if not known:
        results["val"] = judge_samples(model, data.val, None, goal=goal, fully=not (test and last))
        decision, f1_threshold = Decision.of(goal, results["val"]), results["val"].figures.get("f1_threshold")
    if test:
        results["test"] = judge_samples(model, data.test, decision, f1_threshold)
    if known:
        without_fitted(results.get("test"))
    model.decision = decision
    *_, split = results
    if last:
        results = {split: results[split]}
    for name, result in results.items():
        runs = [_embed_run(model, *run) for run in data.source.oneshot_runs(name)]
        if runs:
            result.figures["omniglot_error"] = oneshot_error(runs, model.distance)
    if shown:
        keep(results[split], getattr(data, split), getattr(model.reader, "entries", None))
    return results


def without_fitted(result: EvaluationResult | None) -> EvaluationResult | None:
    """The result, if there is one, without the figures that go by a threshold: for models whose validation classes are trained on."""
    if result is not None:
        fitted = [name for name in _FITTED if result.figures.pop(name, None) is not None]
        result.notes.append(f"{', '.join(fitted)} are left out: they go by validation, whose classes this model was trained on")
    return result


def check_goal(goal: str, samples: Samples) -> None:
    """Raises ValueError if there is no such goal for a threshold, or so few pairs of these samples differ that it cannot be fitted."""
    rate = goal_rate(goal)
    if rate is None:
        return
    if samples.tuples is not None:
        different = int((~samples.tuples.pairs().same).sum())
    else:
        queries, gallery = (samples.labels[rows] for rows in samples.roles())
        counts = [torch.bincount(side, minlength=len(samples.class_names)) for side in (queries, gallery)]
        different = (len(queries) * len(gallery) - int((counts[0] * counts[1]).sum())) // (2 if samples.gallery is None else 1)
    if rate * different < 10:
        least = 10 / max(different, 1)
        remedy = f"Say far_{rounded_up(least)} or more" if 1.05 * least < 1 else "Say equal_error"
        raise ValueError(
            f"{goal} cannot be fitted: validation has {different:,} different pairs, of which {rate * different:.2g} would be accepted, "
            f"ten are needed. {remedy}"
        )


def check_kind(encoder: type | torch.nn.Module, samples: Samples) -> None:
    """Raises ValueError if an encoder, or its class, is made for texts and the samples are none, or the other way around."""
    takes_texts = getattr(encoder, "takes_texts", False)
    if takes_texts != (samples.kind == "texts"):
        remedy = "it takes texts: use dataset=texts" if takes_texts else "it takes no texts: use encoder=transformer"
        raise ValueError(f"the encoder does not go with {samples}: {remedy}")


def raw(model: Bundle, samples: Samples) -> Bundle:
    """Such inputs themselves as embeddings, under the model's distance; cosine where that is trained, as nothing has trained it here.

    Of texts: counts of their character n-grams.
    """
    trained = any(True for _ in model.distance.parameters())
    distance = {"_target_": "pytorch_metric_learning.distances.CosineSimilarity"} if trained else model.parts["distance"]
    flat = {"_target_": "siamese.encoders.Flatten", "input_shape": list(samples.inputs.shape[1:])}
    parts = {
        "encoder": {"_target_": "siamese.text_encoders.NGrams"} if samples.kind == "texts" else flat,
        "distance": distance,
        # A table's columns are of all sizes; pixels are left as they are.
        "preprocessing": {"_target_": "siamese.bundle.Standardize"} if samples.kind == "images" else model.parts["preprocessing"],
    }
    return Bundle(parts, trust=tuple(part["_target_"].partition(".")[0] for part in parts.values()))  # trusted already: the model holds it


def device(word: str) -> torch.device:
    """Where to judge: "auto" is a GPU of CUDA if there is one, else the processor; or "cpu", "cuda", "cuda:1".

    Raises:
        ValueError: another word, or a GPU that is not there.
    """
    found = torch.cuda.device_count()
    if word == "auto":
        return torch.device("cuda" if found else "cpu")
    if not (known := re.fullmatch(r"cpu|cuda(?::(\d+))?", str(word), re.ASCII)):
        raise ValueError(f"{word} is not known: take auto, cpu, cuda, or cuda:1")
    if word != "cpu" and int(known[1] or 0) >= found:
        raise ValueError(f"{word} is not there, of GPUs that torch can use this machine has {found or 'none'}: say device=cpu")
    return torch.device(word)


def baselines(model: Bundle, data, test: bool, goal: str) -> dict[str, EvaluationResult]:
    """The rows beside a trained model, on the last split: `raw`, of the inputs themselves, and `untrained`, of the model as it is now."""
    rows = {"raw": raw(model, data.val), "untrained": model}
    return {row: result for row, one in rows.items() for result in judge(one, data, test, goal, last=True).values()}


def judge_samples(
    model: Bundle,
    samples: Samples,
    decision: Decision | None,
    f1_threshold: float | None = None,
    goal: str = "equal_error",
    fully: bool = True,
) -> EvaluationResult:
    """One split, by thresholds that were fitted on other samples; None fits them here, to this goal.

    Unless `fully`, no few-shot questions are asked of classes, and there are no intervals.

    Judged are the pairs or triplets that it lists, if it does, or its queries against its gallery, where it has these.
    """
    embeddings = model.embed(samples.inputs).to(model.device)
    fitted = {"goal": goal}
    if decision is not None:
        fitted = {"threshold": decision.threshold, "calibration": [decision.slope, decision.intercept]}
    if samples.tuples is not None:
        listed = samples.tuples._asdict()
        return evaluate_tuples(embeddings, distance=model.distance, ids=samples.ids, f1_threshold=f1_threshold, **listed, **fitted)
    brief = {} if fully else {"ways": (), "certainty": False}
    labels, gallery, names = samples.labels, None, {"ids": samples.ids, "class_names": samples.class_names}
    if samples.gallery is not None:
        queries, held = samples.roles()
        gallery, names["gallery_ids"] = (embeddings[held], labels[held]), [samples.ids[row] for row in held.tolist()]
        embeddings, labels, names["ids"] = embeddings[queries], labels[queries], [samples.ids[row] for row in queries.tolist()]
    with Progress(transient=True, disable=len(samples) < 10_000 or not Console().is_terminal) as bar:
        task = bar.add_task("judging", total=1.0)
        tell = lambda share: bar.update(task, completed=share)  # noqa: E731
        return evaluate(embeddings, labels, model.distance, gallery=gallery, progress=tell, **fitted, **names, **brief)


def _embed_run(model: Bundle, queries: Samples, supports: Samples) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    place = {int(label): row for row, label in enumerate(supports.labels)}
    answer = torch.tensor([place[int(label)] for label in queries.labels])
    return model.embed(queries.inputs).to(model.device), model.embed(supports.inputs).to(model.device), answer


def figures(results: dict[str, EvaluationResult]) -> Iterator[tuple[str, float | list[float]]]:
    """All figures under their contract names, `test/recall_at_1`, and intervals, `test/recall_at_1_ci95`."""
    for prefix, result in results.items():
        for name, value in result.figures.items():
            yield f"{prefix}/{name}", value
            if name in result.intervals:
                yield f"{prefix}/{name}_ci95", result.intervals[name]
