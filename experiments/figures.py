"""Makes the tables and figures of experiments/README.md from the files under
experiments/evidence/.

    python experiments/figures.py

Tables replace what stands between their marks in README.md; the figure is
experiments/evidence/cpu.svg."""

import json
import math
import re
import sys
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evidence import KEPT, RUNS, flags_of  # noqa: E402

import flops  # noqa: E402
import train  # noqa: E402
from model import counts  # noqa: E402

HERE = Path(__file__).resolve().parent
COLOURS = {"vanilla-15": "#1f77b4", "vanilla-50": "#9467bd", "self-50": "#d62728",
           "self-50-full": "#8c564b"}  # fmt: skip


def load():
    """{name: (flags, FLOPs of a step, evaluations)} of the runs that are there."""
    runs = {}
    for name in RUNS:
        path = KEPT / f"{name}.jsonl"
        if path.exists():
            args = train.parse_flags(flags_of(name).split())
            args.vocab_size = 2048
            k, n_m, _ = counts(args.seq_len, args.mask_rate, args.strategy)
            config = train.make_model(args).config
            work = 3 * args.batch_size * flops.forward(config, args.seq_len, n_m, k)
            log = [json.loads(line) for line in path.read_text().splitlines()]
            runs[name] = args, work, [x for x in log if "val_loss" in x]
    return runs


def at_15(entry, key):
    """A value of an evaluation at 15%; kept logs of runs at 15% have it under its plain name."""
    return entry[f"{key}_15"] if f"{key}_15" in entry else entry[key]


def kind_of(name):
    return name.rpartition(".")[0].removesuffix("-longer")


def seconds_of(runs):
    """{kind: seconds of a step}, from the paired measurement; vanilla-15 and self-50 only."""
    path = KEPT / "speed.json"
    speeds = json.loads(path.read_text()) if path.exists() else {}
    args = next(iter(runs.values()))[0]
    tokens = args.batch_size * args.seq_len
    return {name.rpartition(".")[0]: tokens / median(x) for name, x in speeds.items()}


def figure(runs):
    """Masked perplexity at 15% against steps, FLOPs and seconds."""
    seconds, labels = seconds_of(runs), []
    titles = ("steps", "FLOPs, of vanilla-15's run", "seconds, of vanilla-15's run")
    base = runs["vanilla-15.0"][0].max_steps, runs["vanilla-15.0"][1]
    canvas, panels = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True, layout="constrained")
    for name, (_, work, log) in runs.items():
        kind = kind_of(name)
        if kind not in COLOURS:
            continue
        clock = seconds[kind] / seconds["vanilla-15"] if kind in seconds else math.nan
        line = ":" if "longer" in name else "-"
        style = dict(color=COLOURS[kind], linestyle=line, marker="o", markersize=2.5)
        label = kind + ", longer" * ("longer" in name)
        style["label"] = (
            label if label not in labels else None
        )  # one line of the legend for all seeds
        labels.append(label)
        for panel, scale in zip(panels, (1, work / base[1] / base[0], clock / base[0])):
            xs = [x["step"] * scale for x in log]
            panel.plot(xs, [at_15(x, "ppl_masked") for x in log], **style)
    for panel, title in zip(panels, titles):
        panel.set(xlabel=title, yscale="log")
        panel.grid(alpha=0.3)
        panel.minorticks_off()
        ticks = [20, 30, 40, 50, 70, 100, 150, 200, 300, 500]
        panel.set_yticks(ticks, ticks)
    panels[0].set_ylabel("masked perplexity at 15%")
    panels[0].legend()
    canvas.savefig(HERE / "evidence/cpu.svg", dpi=120)


def table(runs):
    """Every run: what it cost, relative to vanilla-15, and its last evaluation."""
    seconds = seconds_of(runs)
    steps, work = runs["vanilla-15.0"][0].max_steps, runs["vanilla-15.0"][1]
    rows = ["| run | steps | FLOPs | seconds | loss at 15% | perplexity at 15% | at its own rate |"]
    rows += ["|---|---|---|---|---|---|---|"]
    for name, (args, mine, log) in runs.items():
        kind, last = kind_of(name), log[-1]
        cost = last["step"] * mine / steps / work
        clock = (
            last["step"] * seconds[kind] / steps / seconds["vanilla-15"]
            if kind in seconds
            else None
        )
        clock = f"{clock:.2f}" if clock else ""
        values = (at_15(last, "val_loss"), at_15(last, "ppl_masked"), last["ppl_masked"])
        values = " | ".join(f"{x:.3f}" if x < 10 else f"{x:.1f}" for x in values)
        done = f"{last['step']:,}" + f" of {args.max_steps:,}" * (last["step"] < args.max_steps)
        rows.append(f"| {name} | {done} | {cost:.2f} | {clock} | {values} |")
    return "\n".join(rows)


def main():
    path, runs = HERE / "README.md", load()
    figure(runs)
    marks = r"(<!-- runs-cpu -->\n).*?(<!-- end -->)"
    text = re.sub(marks, lambda m: m[1] + table(runs) + "\n" + m[2], path.read_text(), flags=re.S)
    path.write_text(text)


if __name__ == "__main__":
    main()
