"""The study in experiments/README.md: does 3ML keep its promise?

    python experiments/evidence.py --jobs 2               runs what is not yet there, two at a time
    python experiments/evidence.py --only six/self-50.1   one run, if its log is not yet there
    python experiments/evidence.py --draw                 only the figures and the tables

A run is train.py with the flags of its setting and its own, on one core; its log is kept as
experiments/evidence/SETTING/NAME.jsonl. An interrupted run resumes. The figures, and the tables
of experiments/evidence/README.md, are made from these logs and nothing else."""

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flops  # noqa: E402
import train  # noqa: E402
from model import counts  # noqa: E402

HERE = ROOT / "experiments"
V15, V50 = "--decoder none --mask_rate 0.15", "--decoder none --mask_rate 0.5"
RATES = (15, 25, 40, 50, 60)  # percent, of Figures 3 and 5
CHOICES = {  # Table 2, section 3.3; not named: 2 layers, width 128, 80-10-10, pre-LN
    "1 layer": "--n_layer_dec 1",
    "4 layers": "--n_layer_dec 4",
    "width 64": "--n_embd_dec 64",
    "width 256": "--n_embd_dec 256",
    "100-0-0": "--strategy 1 0 0",
    "80-20-0": "--strategy 0.8 0.2 0",
    "80-0-20": "--strategy 0.8 0 0.2",
    "post-LN": "--norm post",
}
HALF = "--max_steps 2250 --eval_every 250"
THRICE = "--decoder cross --max_steps 13500 --eval_every 1500"
SETTINGS = {
    "six": "--n_layer 6 --n_layer_dec 2 --seq_len 64 --lr 2e-3 --log_every 100",
    "tiny": "--n_layer_dec 2 --log_every 100",
}
RUNS = {  # setting/name: flags. The number behind the last dot is the seed.
    **{f"six/vanilla-15.{seed}": V15 for seed in range(3)},
    **{f"six/vanilla-50.{seed}": V50 for seed in range(3)},
    **{f"six/self-50.{seed}": "" for seed in range(3)},
    "six/self-50, width 256.0": CHOICES["width 256"],
    "six/self-50, 80-0-20.0": CHOICES["80-0-20"],
    "six/vanilla-50, 80-0-20.0": f"{V50} {CHOICES['80-0-20']}",
    "six/cross-50.0": "--decoder cross",
    "six/self-50, equal FLOPs.0": "--max_steps 6138",
    **{f"six/vanilla-15, half, lr {lr}.0": f"{V15} {HALF} --lr {lr}" for lr in (5e-4, 1e-3, 2e-3)},
    **{f"six/self-50, half, lr {lr}.0": f"{HALF} --lr {lr}" for lr in (5e-4, 1e-3, 2e-3)},
    **{f"tiny/vanilla-15.{seed}": V15 for seed in range(3)},
    "tiny/vanilla-15, lr 1.4e-3.0": f"{V15} --lr 1.4e-3",
    "tiny/vanilla-15, 80-0-20.0": f"{V15} {CHOICES['80-0-20']}",
    "tiny/vanilla-50, 80-0-20.0": f"{V50} {CHOICES['80-0-20']}",
    **{f"tiny/vanilla-{rate}.0": f"--decoder none --mask_rate 0.{rate}" for rate in RATES[1:]},
    **{f"tiny/self-{rate}.0": f"--mask_rate 0.{rate}" for rate in RATES},
    **{f"tiny/self-50, {name}.0": flags for name, flags in CHOICES.items()},
    **{f"tiny/self-50, 1 layer.{seed}": CHOICES["1 layer"] for seed in (1, 2)},
    "tiny/self-50, 1 layer, lr 1.4e-3.0": "--n_layer_dec 1 --lr 1.4e-3",
    "tiny/cross-50.0": "--decoder cross",
    "tiny/cross-50, 1 layer.0": "--decoder cross --n_layer_dec 1",
    **{f"tiny/cross-{r}, thrice the steps.0": f"{THRICE} --mask_rate 0.{r}" for r in RATES},
    **{
        f"tiny/cross-50, {name}, thrice the steps.0": f"{THRICE} {CHOICES[name]}"
        for name in ("100-0-0", "80-20-0", "80-0-20", "width 256", "post-LN")
    },
}
INTRODUCTION = """# All runs of the study

Written by `python experiments/evidence.py --draw` from the logs beside this file; what follows from
them is [here](../README.md#does-3ml-keep-its-promise). A name has the decoder (vanilla: none), the
masking rate in percent, and what else is changed. FLOPs are a share of vanilla-15's in the same
setting, perplexities those of the last evaluation. Minutes are on one core, some of a machine
that was half as fast: do not compare those of tiny. Of tiny, lr 1.4e-3 and cross-50 with
one layer are of versions whose Transformer layers were written by hand (the same function).
"""
COLOURS = {"vanilla-15": "tab:blue", "vanilla-50": "tab:purple", "self-50": "tab:red",
           "self-50, equal FLOPs": "tab:orange", "self-50, width 256": "tab:brown",
           "cross-50": "tab:green"}  # fmt: skip


def flags_of(name):
    setting, kind = name.split("/")
    return [*SETTINGS[setting].split(), "--seed", kind.rpartition(".")[2], *RUNS[name].split()]


def run(name):
    """One run, if its log is not kept yet."""
    kept, out = HERE / f"evidence/{name}.jsonl", ROOT / "out/evidence" / name
    if not kept.exists():
        argv = [sys.executable, ROOT / "train.py", "--out", out, *flags_of(name)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(argv, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        kept.parent.mkdir(exist_ok=True)
        kept.write_text((out / "log.jsonl").read_text())
        print(name, "done", flush=True)


def cost(name):
    """(forward FLOPs of a row, rows of a step, tokens of a row, steps) of a run."""
    args = train.parse_flags(flags_of(name))
    args.vocab_size = 2048
    k, n_m, _ = counts(args.seq_len, args.mask_rate, args.strategy)
    forward = flops.forward(train.make_model(args).config, args.seq_len, n_m, k)
    return forward, args.batch_size, args.seq_len, args.max_steps


def curves(setting):
    """{kind: its runs in a setting}, of each seed an array with a row an evaluation: FLOPs (1 is
    vanilla-15's whole run), minutes, masked perplexity at 15%, and at the run's own rate that of
    [MASK]s, of replaced and of unchanged tokens. Minutes are at the speed that a twentieth of the
    log exceeds, since other jobs slow the rest."""
    kinds, (forward, _, _, steps) = {}, cost(f"{setting}/vanilla-15.0")
    whole = forward * steps
    for name in RUNS:
        path = HERE / f"evidence/{name}.jsonl"
        if name.startswith(setting) and path.exists():
            log = [json.loads(line) for line in path.read_text().splitlines()]
            forward, batch_size, n, _ = cost(name)
            speeds = [x["tokens_per_s"] for x in log if "loss" in x] or [math.nan]
            minutes = batch_size * n / np.percentile(speeds, 95) / 60
            rows = [
                [x["step"] * forward / whole, x["step"] * minutes]
                + [x[f"ppl_{key}"] for key in ("masked_15", "masked", "replaced", "unchanged")]
                for x in log
                if "val_loss" in x
            ]
            kind = name.split("/")[1].rpartition(".")[0]
            kinds.setdefault(kind, []).append(np.array(rows, dtype=float))  # None becomes nan
    return kinds


def draw(kinds):
    """Masked perplexity at 15% against FLOPs and minutes; bands from the least to the greatest."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for kind in [kind for kind in COLOURS if kind in kinds]:
        runs = np.array(kinds[kind])  # (seeds, evaluations, 6)
        for panel, x in zip(panels, runs.mean(0).T):
            y = runs[:, :, 2]
            label = f"{kind} ({len(runs)} seed{'s' * (len(runs) > 1)})"
            panel.plot(x, np.exp(np.log(y).mean(0)), ".-", color=COLOURS[kind], label=label)
            panel.fill_between(x, y.min(0), y.max(0), color=COLOURS[kind], alpha=0.2, linewidth=0)
    for panel, label in zip(panels, ("FLOPs (1: vanilla-15's run)", "minutes on one core")):
        panel.set(xlabel=label, yscale="log")
        panel.set_yticks(ticks := [10, 20, 30, 50, 100, 200, 300, 500], ticks)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("masked perplexity at 15%")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(HERE / "evidence/study.svg")


def draw_rates(kinds):
    """Masked perplexity at 15% against FLOPs at each masking rate; a point is a run's end."""
    figure, panel = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for model, colour, shift in (("vanilla", "tab:blue", (-24, -13)), ("self", "tab:red", (2, 7))):
        ends = {rate: kinds[f"{model}-{rate}"][0][-1] for rate in RATES}  # of seed 0
        panel.plot(*zip(*(end[[0, 2]] for end in ends.values())), ".-", color=colour, label=model)
        for rate, end in ends.items():
            panel.annotate(f"{rate}%", end[[0, 2]], shift, textcoords="offset points", c=colour)
    panel.set(xlabel="FLOPs (1: vanilla-15's run)", ylabel="masked perplexity at 15%", yscale="log")
    panel.set_ylim(15, 600)
    panel.set_yticks(ticks := [15, 20, 30, 50, 100, 200, 300, 500], ticks)
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(HERE / "evidence/rates.svg")


def table(kinds):
    """Each kind of run: its cost, and its perplexities at the end; at 15%, of every seed."""
    rows = ["| run | FLOPs | minutes | masked perplexity at 15%, by seed | at its own rate: masked "
            "| replaced | unchanged |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for kind, runs in kinds.items():
        ends = np.array([run[-1] for run in runs])  # (seeds, 6)
        work, minutes = np.nanmean(ends[:, :2], axis=0)  # a log may lack its speeds
        seeds = ", ".join(f"{x:.1f}" for x in ends[:, 2])
        own = " | ".join("" if math.isnan(x) else f"{x:.1f}" for x in ends[:, 3:].mean(0))
        rows.append(f"| {kind} | {work:.2f} | {minutes:.0f} | {seeds} | {own} |")
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
    tables = []
    for setting in SETTINGS:
        kinds = curves(setting)
        tables.append(f"## {setting}: `{SETTINGS[setting]}`\n\n{table(kinds)}\n")
        if setting == "six":
            draw(kinds)
        else:
            draw_rates(kinds)
    (HERE / "evidence/README.md").write_text("\n".join([INTRODUCTION, *tables]))


if __name__ == "__main__":
    main()
