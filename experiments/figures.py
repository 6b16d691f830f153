"""Makes the tables and figures of experiments/README.md from the files under experiments/evidence/ alone.

    python experiments/figures.py

Tables replace what stands between their marks in README.md; figures are experiments/evidence/SETTING.svg.
"""

import json
import math
import re
import sys
from pathlib import Path
from statistics import mean, median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evidence import RUNS, SETTINGS, flags_of  # noqa: E402

import flops  # noqa: E402
import train  # noqa: E402
from data import counts, parse_flags  # noqa: E402

HERE = Path(__file__).resolve().parent
VOCABULARY = dict(cpu=2048, gpu=8192)
COLOURS = {"vanilla-15": "#1f77b4", "vanilla-50": "#9467bd", "self-50": "#d62728", "self-40": "#ff7f0e",
           "cross-40": "#2ca02c", "self-50-full": "#8c564b"}  # fmt: skip


def load(setting):
    """{name: (Config, FLOPs of a step, evaluations)} of the runs that are there."""
    runs = {}
    for name in RUNS:
        path = HERE / f"evidence/{setting}/{name}.jsonl"
        if path.exists():
            config = parse_flags(train.Config, flags_of(name, setting).split(), "", train.presets)
            config.vocab_size = VOCABULARY[setting]
            k, n_m, _ = counts(config.seq_len, config.mask_rate, config.strategy)
            work = 3 * config.batch_size * flops.forward(config, config.seq_len, n_m, k)
            log = [json.loads(line) for line in path.read_text().splitlines()]
            runs[name] = config, work, [x for x in log if "val_loss" in x]
    return runs


def at_15(entry, key):
    """A value of an evaluation at 15%; kept logs of runs at 15% have it under its plain name."""
    return entry[f"{key}_15"] if f"{key}_15" in entry else entry[key]


def kind_of(name):
    return name.rpartition(".")[0].removesuffix("-longer")


def seconds_of(runs, setting):
    """{kind: seconds of a step}, from the paired measurement; vanilla-15 and 3ML models only."""
    path = HERE / f"evidence/{setting}/speed.json"
    speeds = json.loads(path.read_text()) if path.exists() else {}
    config = next(iter(runs.values()))[0]
    tokens = config.batch_size * config.seq_len
    return {name.rpartition(".")[0]: tokens / median(x) for name, x in speeds.items()}


def figure(runs, setting):
    """Masked perplexity at 15% against steps, FLOPs and seconds."""
    seconds = seconds_of(runs, setting)
    titles = ("steps", "FLOPs, of vanilla-15's run", "seconds, of vanilla-15's run")
    base = runs["vanilla-15.0"][0].max_steps, runs["vanilla-15.0"][1]
    labels = []
    canvas, panels = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True, layout="constrained")
    for name, (_, work, log) in runs.items():
        kind = kind_of(name)
        if kind not in COLOURS:
            continue
        steps = [x["step"] for x in log]
        clock = seconds[kind] / seconds["vanilla-15"] if kind in seconds else math.nan
        scales = (1, work / base[1] / base[0], clock / base[0])
        style = dict(
            color=COLOURS[kind], linestyle=":" if "longer" in name else "-", marker="o", markersize=2.5
        )
        label = kind + ", longer" * ("longer" in name)
        style["label"] = label if label not in labels else None  # one line of the legend for all seeds
        labels.append(label)
        for panel, scale in zip(panels, scales):
            panel.plot([s * scale for s in steps], [at_15(e, "ppl_masked") for e in log], **style)
    for panel, title in zip(panels, titles):
        panel.set(xlabel=title, yscale="log")
        panel.grid(alpha=0.3)
        panel.minorticks_off()
        ticks = [20, 30, 40, 50, 70, 100, 150, 200, 300, 500]
        panel.set_yticks(ticks, ticks)
    panels[0].set_ylabel("masked perplexity at 15%")
    panels[0].legend()
    canvas.savefig(HERE / f"evidence/{setting}.svg", dpi=120)


def table(runs, setting):
    """Every run: what it cost, relative to vanilla-15, and its last evaluation."""
    seconds = seconds_of(runs, setting)
    steps, work = runs["vanilla-15.0"][0].max_steps, runs["vanilla-15.0"][1]
    rows = ["| run | steps | FLOPs | seconds | loss at 15% | masked perplexity at 15% | at its own rate |"]
    rows += ["|---|---|---|---|---|---|---|"]
    for name in RUNS:
        if name not in runs:
            rows.append(f"| {name} | not run | | | | | |")
            continue
        config, mine, log = runs[name]
        kind, last = kind_of(name), log[-1]
        cost = last["step"] * mine / steps / work
        clock = last["step"] * seconds[kind] / steps / seconds["vanilla-15"] if kind in seconds else None
        clock = f"{clock:.2f}" if clock else ""
        values = (at_15(last, "val_loss"), at_15(last, "ppl_masked"), last["ppl_masked"])
        values = " | ".join(f"{x:.3f}" if x < 10 else f"{x:.1f}" for x in values)
        done = f"{last['step']:,}" + f" of {config.max_steps:,}" * (last["step"] < config.max_steps)
        rows.append(f"| {name} | {done} | {cost:.2f} | {clock} | {values} |")
    return "\n".join(rows)


def glue_table(setting):
    """Medians of three seeds per task, with the range, for each fine-tuned run."""
    runs = {}
    for path in sorted((HERE / f"evidence/{setting}").glob("*.glue.jsonl")):
        for line in path.read_text().splitlines():
            run = json.loads(line)
            runs.setdefault(path.name.removesuffix(".glue.jsonl"), {}).setdefault(run["task"], []).append(
                run["score"]
            )
    tasks = sorted({task for scores in runs.values() for task in scores})
    rows = [f"| run | {' | '.join(tasks)} | mean |", "|" + "---|" * (len(tasks) + 2)]
    for name, scores in runs.items():
        cells = [
            f"{100 * median(x):.1f} ({100 * min(x):.1f}-{100 * max(x):.1f})" for x in map(scores.get, tasks)
        ]
        average = mean(median(x) for x in scores.values())
        rows.append(f"| {name} | {' | '.join(cells)} | {100 * average:.1f} |")
    return "\n".join(rows) if runs else "Not run."


def main():
    path = HERE / "README.md"
    text = path.read_text()
    for setting in SETTINGS:
        runs, tables = load(setting), {f"glue-{setting}": glue_table(setting)}
        if "vanilla-15.0" in runs:
            figure(runs, setting)
            tables[f"runs-{setting}"] = table(runs, setting)
        for name, content in tables.items():
            marks = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
            text = re.sub(marks, lambda m, content=content: m[1] + content + "\n" + m[2], text, flags=re.S)
    path.write_text(text)


if __name__ == "__main__":
    main()
