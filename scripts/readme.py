"""Write what follows from the code and from measurements: a part of README.md, and pages of docs/.

python scripts/readme.py           # rewrite them in place
python scripts/readme.py --check   # exit code 1 when they are out of date
"""

import argparse
import json
import re
import sys

from omegaconf import OmegaConf

from siamese.config import CONF, ROOT, available

README, DOCS = ROOT / "README.md", ROOT / "docs"


def defaults() -> dict[str, str]:
    """Group -> its choice in conf/train.yaml, in the order of that file."""
    lines = OmegaConf.to_container(OmegaConf.load(CONF / "train.yaml").defaults, resolve=False)
    return {group: choice for line in lines if line != "_self_" for group, choice in line.items()}


def about(group: str, choice: str) -> str:
    """The first comment line of a choice's YAML."""
    for line in (CONF / group / f"{choice}.yaml").read_text().splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            return line.removeprefix("# ")
    return ""


def options() -> str:
    rows = ["| group | choices, the default in bold |", "| --- | --- |"]
    for group, default in defaults().items():
        if group != "paths" and not group.startswith("optional "):
            choices = [f"**{choice}**" if choice == default else choice for choice in available(group)]
            rows.append(f"| `{group}=` | {', '.join(choices)} |")
    return "\n".join(rows)


def combinations() -> str:
    """The table of what goes with what, losses and miners of one row together; margins stand in the YAMLs."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for group in ("loss", "miner"):
        for choice in sorted(set(available(group)) - {"none"}):
            accepts = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{choice}.yaml"), resolve=False).get("goes_with", {})
            samplings = accepts.get("sampling", ["balanced"] if group == "miner" else ["as the losses within"])
            distances = list(accepts.get("distance", ["any" if group == "miner" else "as the losses within"]))
            if {"cosine", "euclidean"} < set(distances):
                distances = ["any"]
            rest = f"`{group}=` {{}}" + ("; no miner" if accepts.get("miner") == ["none"] else "")
            rows.setdefault((group, ", ".join(samplings), ", ".join(distances), rest), []).append(choice)
    table = ["| | `sampling=` | `distance=` |", "| --- | --- | --- |"]
    table += [f"| {rest.format(', '.join(names))} | {samplings} | {distances} |" for (_, samplings, distances, rest), names in rows.items()]
    return "\n".join(table)


def figures() -> str:
    values = {row["name"]: row["value"] for row in json.loads((ROOT / "docs" / "default.json").read_text())}
    shown = ("recall_at_1", "map_at_r", "auc", "eer", "oneshot_20way")
    rows = [f"| mean of seeds 0, 1, 2 on test | {' | '.join(f'`{name}`' for name in shown)} |", "| --- |" + " ---: |" * len(shown)]
    for prefix, label in (("raw", "raw input"), ("untrained", "untrained encoder"), ("test", "**trained**")):
        cells = [f"{values[f'glyphs {prefix} {name}']:.3f}" for name in shown]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    koch = {row["name"]: row["value"] for row in json.loads((ROOT / "docs" / "koch.json").read_text())}
    ours, paper = (f"{koch[f'koch {whose}official one-shot accuracy']:g} %" for whose in ("", "paper "))
    records = {row["name"]: row["value"] for row in json.loads((ROOT / "docs" / "omniglot.json").read_text())}
    costs = {row["name"]: row["value"] for row in json.loads((ROOT / "docs" / "training.json").read_text())}
    rows += [
        "",
        f"{values['glyphs command to prompt']:.0f} seconds from command to prompt on two CPU cores. "
        "Omniglot's official one-shot questions ([all](docs/omniglot.md)): "
        f"`experiment=omniglot_record` {100 - records['full: error']:.1f} %, on five alphabets "
        f"{100 - records['small1 and small2: error']:.1f} %,",
        f"`omniglot_quick` {100 - costs['omniglot_quick: error']:.1f} % in {costs['omniglot_quick: minutes']:.1f} minutes "
        f"([what training costs](docs/training.md)); people 95.5 %; Koch's network of 2015, `experiment=koch`, {ours}, "
        f"in its paper, with more data, {paper}.",
    ]
    return "\n".join(rows)


BLOCKS = {"figures": figures}


def render(text: str) -> str:
    """README.md with every block between its markers written anew."""
    for name, write in BLOCKS.items():
        begin, end = f"<!-- {name}: written by scripts/readme.py -->", f"<!-- end of {name} -->"
        block = f"{begin}\n{write()}\n{end}".replace("\\", r"\\")
        text, found = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", block, text, flags=re.DOTALL)
        if found != 1:
            sys.exit(f"error: README.md must hold the block {name} once, it holds it {found} times")
    return text


def choices() -> str:
    """docs/options.md: the groups, and what goes with what."""
    about = (
        "# Options",
        "",
        "Written by `scripts/readme.py` from `conf/`. Each choice is a short YAML in `conf/<group>/`, swapped by `loss=triplet`, of which",
        "every key can be set: `loss.margin=0.1`.",
        "",
        options(),
        "",
        "Losses and miners with the batches and distances that they are defined for. *sphere* is cosine, or normalised Euclidean, which",
        "ranks alike; margins for each distance stand in the YAML.",
        "",
        combinations(),
    )
    return "\n".join(about) + "\n"


def measured(name: str, more: tuple[str, ...] = ()) -> list[str]:
    """The rows that a benchmark has written, as a table; in bold what misses its target, at most that but for rows with words of `more`."""
    lines = ["| | measured | target |", "| --- | ---: | ---: |"]
    for row in json.loads((DOCS / f"{name}.json").read_text()):
        number = f"{row['value']:,.0f}" if row["value"] >= 1000 else f"{row['value']:.3g}"
        value, target = f"{number} {row['unit']}".strip(), row["target"]
        sign = -1 if any(word in row["name"] for word in more) else 1
        missed = target is not None and sign * row["value"] > sign * target
        lines.append(f"| {row['name']} | {f'**{value}**' if missed else value} | {'' if target is None else f'{target:g}'} |")
    return lines


def evaluation() -> str:
    """docs/evaluation.md: what judging costs and how exact it is."""
    about = (
        "# What judging costs, and how exact it is",
        "",
        "Written by `scripts/readme.py` from what `python scripts/benchmark_evaluation.py --full --json docs/evaluation.json` measured on",
        "one core: CPU seconds, ours and the other in turn. In bold what misses its target, which is at most that. The data and the",
        "products are described at the top of that script, the rules of judging in `src/siamese/evaluation.py`, how one pass gives all",
        "figures in `src/siamese/_walk.py`.",
        "",
        "Scores are rounded to 2^-20, which may flatter a figure as well as not: hence 1e-06 where nothing would be asked for. Beyond",
        "2^26 scores, different pairs are counted in bins of 2^-13 but for the highest 1/512; the rows of 9,000 items show what that",
        "does. From 2^24 scores on they are computed in single precision, which may order two that differ by less than 2^-20 otherwise.",
        "",
        *measured("evaluation"),
    )
    return "\n".join(about) + "\n"


def recognition() -> str:
    """docs/recognition.md: what recognition costs and what its decisions are worth."""
    about = (
        "# What recognition costs, and what its decisions are worth",
        "",
        "Written by `scripts/readme.py` from what `python scripts/benchmark_recognition.py --full --json docs/recognition.json` measured,",
        "on one thread: CPU seconds, ours and the other in turn. Throughput and what is the same are to be at least their target, all else",
        "at most.",
        "",
        "One example of each class is enrolled, all others ask: drawings of the 20 alphabets that Omniglot keeps for evaluation, by",
        "`experiment=omniglot_semihard`; questions of the 50 intents of CLINC150 that are kept for testing, by MiniLM after an epoch on 80",
        "others. Strangers are drawings of classes that are not enrolled, or questions of no intent. Means over 20 draws.",
        "",
        *measured("recognition", more=("throughput", "the same file", "neighbours")),
    )
    return "\n".join(about) + "\n"


def omniglot() -> str:
    """docs/omniglot.md: the final recipes on the published measures."""
    about = (
        "# Omniglot's published measures",
        "",
        "Written by `scripts/readme.py` from what `python scripts/benchmark_omniglot.py --full --json docs/omniglot.json` measured. The",
        "error is of the authors' twenty runs of 20-way one-shot recognition within an alphabet (Lake, Salakhutdinov and Tenenbaum 2015),",
        "400 questions, whose standard error is about a point. All choices were made on alphabets of the background set; the runs were",
        "looked at once for each seed of a final recipe, of which there was an earlier one, of 32 x 32 pixels and fewer steps. The error",
        "is of a single view of each drawing, embedded by one encoder and compared by the cosine; views averaged, and the embeddings of",
        "all seeds side by side, are rows of their own. The reduced",
        "backgrounds `small1` and `small2` have five alphabets each, the full one thirty. Minutes are of training on one thread, with",
        "bfloat16 but for `characters`. What each part of the recipe is worth, within 600 steps, is [a page of its own](recipe.md).",
        "In bold what misses its target: at most that of errors, at least that of accuracies.",
        "",
        *measured("omniglot", more=(": oneshot", ": fewshot")),
        "",
        "Published, in percent of errors: people 4.5; Bayesian program learning 3.3, and 4.3 and 4.0 on the reduced backgrounds, which is",
        "given the strokes; a convnet 13.5, and 24.0 and 22.3; Koch et al. 2015 8.0, with more data; ARC 2.25, or 1.5 where it sees all",
        "candidates at once. From Lake et al. 2015 and 2019 (arXiv:1902.03477), Shyam et al. 2017 (arXiv:1703.00767).",
    )
    return "\n".join(about) + "\n"


def training() -> str:
    """docs/training.md: what training costs."""
    about = (
        "# What training costs",
        "",
        "Written by `scripts/readme.py` from what `python scripts/benchmark_training.py --full --json docs/training.json` measured on a",
        "processor with bfloat16: steps in CPU seconds of one thread, all else by the clock on two cores, in turn with what it is compared",
        "with. In bold what misses its target: at least that of samples a second, at most that of all else. `omniglot_quick` is timed from",
        "command to prompt, judged on Omniglot's official runs.",
        "",
        *measured("training", more=("samples",)),
        "",
        "On a GPU, one H100: `python scripts/benchmark_training.py --gpu --json docs/training_gpu.json`. ResNet-50 in bfloat16, 32 classes",
        "x 4 photos of 224 pixels that are held in memory. A step waits for the processor more than for the GPU, so the ratios differ from",
        "machine to machine. A loop that makes each batch when it needs it, in memory that is not pinned, is what one writes first; the",
        "last three rows are beside one whose batches a thread makes, as it does in the whole system.",
        "",
        *measured("training_gpu", more=("samples",)),
    )
    return "\n".join(about) + "\n"


def texts() -> str:
    """docs/texts.md: questions by intent, and products."""
    about = (
        "# Texts",
        "",
        "Written by `scripts/readme.py` from what `python scripts/benchmark_texts.py --full --json docs/texts.json` measured, with MiniLM",
        "(six layers, 384 numbers a text). Questions are those of CLINC150 (Larson et al. 2019), by intent: of 50 intents when trained on",
        "80 others, and of all 150 by the nearest of ten examples of each, before training, after training on 80 of them, and with",
        "`experiment=intents` on just these ten. Products are those of Abt-Buy (Mudgal et al. 2018), by `experiment=matching`; the",
        "threshold is fitted on validation. All choices were made on the authors' validation splits. In bold what misses its target.",
        "",
        *measured("texts", more=("",)),
        "",
        "Published: ten examples of each intent, 94.18 % (Zhang et al. 2021, arXiv:2109.06349), by a classifier of five times the",
        "weights; Abt-Buy, 62.8 (DeepMatcher, Mudgal et al. 2018) and 89.3 (Ditto, Li et al. 2020, arXiv:2004.00584), which read the two",
        "texts of each pair together, word by word, and so cannot look one up among many.",
    )
    return "\n".join(about) + "\n"


PAGES = {
    **{"options": choices, "evaluation": evaluation, "recognition": recognition},
    **{"omniglot": omniglot, "training": training, "texts": texts},
}


if __name__ == "__main__":
    new = {README: render(README.read_text()), **{DOCS / f"{name}.md": write() for name, write in PAGES.items()}}
    old = {path: path.read_text() if path.is_file() else "" for path in new}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when something is out of date")
    if parser.parse_args().check:
        late = [str(path.relative_to(ROOT)) for path in new if old[path] != new[path]]
        sys.exit(f"out of date: {', '.join(late)}: run python scripts/readme.py" if late else 0)
    for path, text in new.items():
        path.write_text(text)
