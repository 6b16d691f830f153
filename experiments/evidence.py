"""The study in experiments/README.md: does 3ML keep its promise?

    python experiments/evidence.py --jobs 2             runs what is not yet there, two at a time
    python experiments/evidence.py --only self-50.1     one run, if its log is not yet there
    python experiments/evidence.py --draw               only the figure and the table

A run is train.py with its recipe tiny and the flags in RUNS, on one core; its log is kept as
experiments/evidence/NAME.jsonl. An interrupted run resumes. The figure, and the table between its
marks in experiments/README.md, are made from these logs and nothing else."""

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flops  # noqa: E402
import train  # noqa: E402
from model import counts  # noqa: E402

HERE = ROOT / "experiments"
V15 = "--decoder none --mask_rate 0.15"
RUNS = {  # name: flags. The number behind the last dot is the seed.
    "vanilla-15.0": V15,
    "vanilla-15.1": V15,
    "vanilla-15.2": V15,
    "self-50.0": "",
    "self-50.1": "",
    "self-50.2": "",
    "vanilla-15, lr 1.4e-3.0": f"{V15} --lr 1.4e-3",
    "self-50, lr 1.4e-3.0": "--lr 1.4e-3",
    "vanilla-40.0": "--decoder none --mask_rate 0.4",
    "vanilla-50.0": "--decoder none --mask_rate 0.5",
    "self-40.0": "--mask_rate 0.4",
    "cross-50.0": "--decoder cross",
    "cross-50, 2 layers.0": "--decoder cross --n_layer_dec 2",
}
COLOURS = {"vanilla-15": "tab:blue", "vanilla-50": "tab:purple", "self-50": "tab:red",
           "cross-50": "tab:green"}  # fmt: skip


def run(name):
    """One run, if its log is not there yet."""
    kept, out = HERE / f"evidence/{name}.jsonl", ROOT / "out/evidence" / name
    if not kept.exists():
        flags = [*RUNS[name].split(), "--seed", name.rpartition(".")[2], "--log_every", "100"]
        argv = [sys.executable, ROOT / "train.py", "--out", out, *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(argv, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        kept.write_text((out / "log.jsonl").read_text())
        print(name, "done", flush=True)


def forward_flops(name):
    """Of a row, through the model of a run."""
    args = train.parse_flags(RUNS[name].split())
    args.vocab_size = 2048
    k, n_m, _ = counts(args.seq_len, args.mask_rate, args.strategy)
    return flops.forward(train.make_model(args).config, args.seq_len, n_m, k)


def evaluations():
    """{name without seed: (FLOPs of a step over vanilla-15's, steps, masked perplexities at 15% and
    at the run's own rate, both (seeds, evaluations))} of the runs that are there."""
    runs, base = {}, forward_flops("vanilla-15.0")
    for name in RUNS:
        path = HERE / f"evidence/{name}.jsonl"
        if path.exists():
            entries = [json.loads(line) for line in path.read_text().splitlines()]
            entries = [entry for entry in entries if "val_loss" in entry]
            steps = [entry["step"] for entry in entries]
            kind = runs.setdefault(
                name.rpartition(".")[0], (forward_flops(name) / base, steps, [], [])
            )
            kind[2].append([entry["ppl_masked_15"] for entry in entries])
            kind[3].append([entry["ppl_masked"] for entry in entries])
    return runs


def draw(runs):
    """Masked perplexity at 15% against steps and FLOPs; bands from the least to the greatest."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for kind, colour in COLOURS.items():
        if kind not in runs:
            continue
        cost, steps, at_15, _ = runs[kind]
        for panel, scale in zip(panels, (1, cost / steps[-1])):
            x, y = np.array(steps) * scale, np.array(at_15)
            panel.plot(x, np.exp(np.log(y).mean(0)), ".-", color=colour, label=kind)
            panel.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.25, linewidth=0)
    for panel, label in zip(panels, ("steps", "FLOPs (1: vanilla-15's run)")):
        panel.set(xlabel=label, yscale="log")
        panel.set_yticks(ticks := [20, 30, 50, 100, 200, 300, 500], ticks)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("masked perplexity at 15%")
    panels[0].legend()
    figure.savefig(HERE / "evidence/study.svg")


def table(runs):
    """Each kind of run: its FLOPs, and its masked perplexities at the end, of every seed."""
    rows = [
        "| run | FLOPs | masked perplexity at 15%, by seed | at its own rate, mean |",
        "|---|---|---|---|",
    ]
    for kind, (cost, _, at_15, own) in runs.items():
        seeds = ", ".join(f"{y[-1]:.1f}" for y in at_15)
        rows.append(f"| {kind} | {cost:.2f} | {seeds} | {mean(y[-1] for y in own):.1f} |")
    return "\n".join(rows)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not args.draw:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(run, args.only))
    runs, path = evaluations(), HERE / "README.md"
    draw(runs)
    marks = r"(<!-- runs -->\n).*?(<!-- end -->)"
    text = re.sub(marks, lambda m: f"{m[1]}{table(runs)}\n{m[2]}", path.read_text(), flags=re.S)
    path.write_text(text)


if __name__ == "__main__":
    main()
