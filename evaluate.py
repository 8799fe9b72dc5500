"""Judge a trained network, or an untrained one, on validation and test classes.

    python evaluate.py ckpt=logs/train/runs/<stamp>/checkpoints/best.ckpt   # the figures that train.py printed, again (device= says where)
    python evaluate.py ckpt=logs/train/runs/<stamp>/bundle.safetensors dataset=omniglot   # on another data set
    python evaluate.py ckpt=logs/train/runs/<stamp>/bundle.safetensors 'also=[omniglot]'   # on several at once
    python evaluate.py dataset=glyphs encoder=conv4                         # no checkpoint: the untrained, or pretrained, row

Writes metrics.json, results.npz and report.html into logs/evaluate/runs/<stamp>/.
"""

from siamese.config import ROOT, InputError, as_input_error, available, build, bundle_arguments, compose, launch


def evaluate(config: dict) -> dict[str, float]:
    """Judge one model, from a checked configuration of plain values to the figures of metrics.json."""
    import logging
    import os
    import time
    from pathlib import Path

    import torch
    from rich.console import Console

    from siamese import judging, record, reporting
    from siamese.bundle import Bundle, construct_trusted
    from siamese.data import checking
    from siamese.data.module import SiameseData
    from siamese.data.samples import Source

    log = logging.getLogger("evaluate")
    out, ckpt = Path(config["paths"]["output_dir"]), config["ckpt"]
    with as_input_error("report"):
        reporting.check_mode(config["report"])
    with as_input_error("device"):
        device = judging.device(config["device"])
    groups = [override.lstrip("+~").partition("=")[0] for override in config["overrides"]]
    if ckpt:
        for group in ("encoder", "distance"):
            if any(g.partition(".")[0] == group for g in groups):
                raise InputError(
                    f"{group} comes from the checkpoint: leave {group}= away, or leave ckpt= away to judge an untrained encoder"
                )
        if "dataset" not in groups and any(g.startswith("dataset.") for g in groups):
            raise InputError("the data set comes from the checkpoint: to change one of its values say dataset=NAME too")
        with as_input_error("ckpt"):
            model = Bundle.load(ckpt, tuple(config["trust"]))
    with as_input_error("dataset"):
        own = ckpt and "dataset" not in groups  # what a file says is not built by Hydra, which may call anything
        source = construct_trusted(model.config["dataset"], Source, tuple(config["trust"])) if own else build(config, "dataset")
    if ckpt and not own:
        with as_input_error("dataset"):
            same_as_trained(model, source, config)
    data = SiameseData(source, None, config["seed"])
    with as_input_error("dataset"):
        log.info("validate on %s, test on %s", data.val, data.test)
        checking.check({}, source.findings(), out, "warn")
    input_shape = list(data.val.inputs.shape[1:])
    if not ckpt:
        torch.manual_seed(config["seed"])
        made_of = bundle_arguments(config, input_shape, data.preprocessing(), source.reading())
        with as_input_error("encoder"):
            model = Bundle(**made_of)
    elif model.parts["encoder"].get("input_shape", input_shape) != input_shape:
        trained = model.parts["encoder"]["input_shape"]
        remedy = ": set dataset.size" if "size" in config["dataset"] else ""
        raise InputError(f"the encoder in {ckpt} takes inputs of shape {trained}, this data set has {input_shape}{remedy}")
    with as_input_error("dataset"):
        judging.check_kind(model.encoder, data.val)
    if config["views"] is not None:
        with as_input_error("views"):
            model.look(config["views"], model.config.get("augmentation", {}))
    goal = config["threshold"] or model.config.get("threshold", "equal_error")
    with as_input_error("threshold"):
        judging.check_goal(goal, data.val)
    others = {name: other_tests(name, data.val, config, model) for name in dict.fromkeys(config["also"])}
    fingerprints = {"val": data.val, "test": data.test, **{f"{name}/test": samples for name, samples in others.items()}}
    fingerprints = {name: samples.fingerprint() for name, samples in fingerprints.items()}
    record.write_json(out / "provenance.json", record.provenance(ROOT, fingerprints))

    started = time.perf_counter()
    plain = judging.raw(model, data.val)
    try:
        model.to(device)
        raw = judging.judge(plain, data, goal=goal, last=True)
        judged = judging.judge(model, data, goal=goal, shown=True, last=not ckpt)
        results = {"raw": raw["test"], **(judged if ckpt else {"untrained": judged["test"]})}
        for name, samples in others.items():
            for judge, row in ((plain, "raw"), (model, "test" if ckpt else "untrained")):
                result = judging.judge_samples(judge, samples, judge.decision)
                results[f"{name}/{row}"] = result if judge.decision else judging.without_fitted(result)
    except torch.OutOfMemoryError:
        raise InputError(f"device={config['device']}: the memory of this GPU does not suffice: say device=cpu") from None
    metrics = record.write(out, results, {"evaluate": time.perf_counter() - started})
    for note in [*list(judged.values())[-1].notes, *record.hardest(list(judged.values())[-1])]:
        log.info(note)
    for name in others:
        for note in results[f"{name}/{row}"].notes:
            log.info("%s: %s", name, note)
    Console().print(record.table(results))
    reporting.report(out, config["report"])
    log.info("figures are in %s", os.path.relpath(out))
    return metrics


def same_as_trained(model, source, config: dict) -> None:
    """Another data set than a model's own: its inputs must be made in the same way, and its validation may be what the model knows.

    Raises:
        ValueError: they are made in another way.
    """
    import contextlib

    from siamese.bundle import construct_trusted
    from siamese.data.samples import Source

    mine, theirs = model.parts.get("reader") or {}, source.reading() or {}
    if mine.get("_target_") == theirs.get("_target_"):
        for key in sorted({*mine, *theirs} - {"size"}):
            if key in config["dataset"] and (mine.get(key) or False) != (theirs.get(key) or False):
                raise ValueError(
                    f"the model was trained with {key}={mine.get(key, False)}: say dataset.{key}={str(mine.get(key, False)).lower()}"
                )
    trained = model.config.get("dataset") or {}
    if trained.get("_target_") == config["dataset"]["_target_"]:
        with contextlib.suppress(ValueError):  # of a version that said it otherwise
            source.trained_on = construct_trusted(trained, Source, tuple(config["trust"])).trained_on


def other_tests(name: str, own, config: dict, model):
    """The test split of another data set than one's own, its images of the size, and made in the way, that the model was trained with."""
    import logging

    said = [override for override in config["overrides"] if override.startswith("paths.")]
    with as_input_error("also"):
        if name not in available("dataset"):
            raise ValueError(f"there is no data set {name}: take some of {', '.join(available('dataset'))}, as in 'also=[omniglot]'")
        other = compose([f"dataset={name}", *said], "evaluate")
        shape = list(own.inputs.shape[1:])
        if own.kind == "images" and "size" in other["dataset"] and other["dataset"]["size"] != shape[-1]:
            said.append(f"dataset.size={shape[-1]}")
        reader = model.parts.get("reader") or {}
        said += [f"dataset.{key}={str(reader[key]).lower()}" for key in ("moments",) if key in reader and key in other["dataset"]]
        other = compose([f"dataset={name}", *said], "evaluate")
        samples = build(other, "dataset").split("test")
        if samples.kind != own.kind or (samples.kind != "texts" and list(samples.inputs.shape[1:]) != shape):
            raise ValueError(
                f"{name} has {samples.kind} of shape {list(samples.inputs.shape[1:])}, the encoder takes {own.kind} of {shape}"
            )
    logging.getLogger("evaluate").info("also test on %s of %s", samples, name)
    return samples


if __name__ == "__main__":
    launch(evaluate, "evaluate")
