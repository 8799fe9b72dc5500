"""Judge a trained network, or an untrained one, on validation and test classes.

    python evaluate.py ckpt=logs/train/runs/<stamp>/checkpoints/best.ckpt   # the figures that train.py printed, again
    python evaluate.py ckpt=logs/train/runs/<stamp>/bundle.safetensors dataset=omniglot   # on another data set
    python evaluate.py dataset=glyphs encoder=conv4                         # no checkpoint: the untrained row

Writes metrics.json and results.npz into logs/evaluate/runs/<stamp>/.
"""

from siamese.config import ROOT, InputError, as_input_error, build, bundle_arguments, launch


def evaluate(config: dict) -> dict[str, float]:
    """Judge one model, from a checked configuration of plain values to the figures of metrics.json."""
    import logging
    import os
    import time
    from pathlib import Path

    import torch
    from rich.console import Console

    from siamese import judging, record
    from siamese.bundle import Bundle, construct_trusted
    from siamese.data.module import SiameseData
    from siamese.data.samples import Source

    log = logging.getLogger("evaluate")
    out, ckpt = Path(config["paths"]["output_dir"]), config["ckpt"]
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
    data = SiameseData(source, None, config["seed"])
    with as_input_error("dataset"):
        log.info("validate on %s, test on %s", data.val, data.test)
    input_shape = list(data.val.inputs.shape[1:])
    if not ckpt:
        torch.manual_seed(config["seed"])
        made_of = bundle_arguments(config, input_shape, data.standardization())
        with as_input_error("encoder"):
            model = Bundle(**made_of)
    elif model.parts["encoder"].get("input_shape", input_shape) != input_shape:
        trained = model.parts["encoder"]["input_shape"]
        remedy = ": set dataset.size" if "size" in config["dataset"] else ""
        raise InputError(f"the encoder in {ckpt} takes inputs of shape {trained}, this data set has {input_shape}{remedy}")
    record.write_json(out / "provenance.json", record.provenance(ROOT, {"val": data.val.fingerprint(), "test": data.test.fingerprint()}))

    started = time.perf_counter()
    raw = judging.judge(judging.raw(model, input_shape), data)
    judged = judging.judge(model, data)
    results = {**judging.last_as("raw", raw), **(judged if ckpt else judging.last_as("untrained", judged))}
    metrics = record.write(out, results, {"evaluate": time.perf_counter() - started})
    for note in list(results.values())[-1].notes:
        log.info(note)
    Console().print(record.table(results))
    log.info("figures are in %s", os.path.relpath(out))
    return metrics


if __name__ == "__main__":
    launch(evaluate, "evaluate")
