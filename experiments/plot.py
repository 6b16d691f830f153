"""Draws runs of train.py side by side: loss and masked perplexity against steps, tokens, FLOPs and
seconds.

    python experiments/plot.py out/a out/b                              writes plot.svg
    python experiments/plot.py out/tiny --file tiny.png --show ppl_masked --against steps

A run is a folder with log.jsonl and config.json. FLOPs are 3 x flops.forward; seconds are those of
training."""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flops  # noqa: E402
import train  # noqa: E402
from model import counts  # noqa: E402

SHOW = dict(
    loss="training loss (nats)",
    ppl_masked="masked perplexity",
    ppl_masked_15="masked perplexity at 15%",
)
AGAINST = ("steps", "tokens", "FLOPs", "seconds")


def read_run(folder):
    """The lines of a run's log, with "steps", "tokens", "FLOPs" and "seconds" in each."""
    args = argparse.Namespace(**json.loads((Path(folder) / "config.json").read_text()))
    k, n_m, _ = counts(args.seq_len, args.mask_rate, args.strategy)
    config = train.make_model(args).config
    # no FLOPs where no formula is known for a decoder
    work = 3 * args.batch_size * (flops.forward(config, args.seq_len, n_m, k) or np.nan)
    entries, step, seconds, tokens = [], 0, 0.0, args.batch_size * args.seq_len
    lines = []
    for line in (Path(folder) / "log.jsonl").read_text().splitlines():
        with suppress(json.JSONDecodeError):  # a full disk leaves a part of a line
            lines.append(json.loads(line))
    # Steps that were done again after an interruption are in the log twice: the last ones count.
    log = {(entry["step"], "val_loss" in entry): entry for entry in lines}
    for _, entry in sorted(log.items()):
        if "tokens_per_s" in entry:
            seconds += (entry["step"] - step) * tokens / entry["tokens_per_s"]
            step = entry["step"]
        done = entry["step"]
        costs = dict(steps=done, tokens=done * tokens, FLOPs=done * work, seconds=seconds)
        entries.append(entry | costs)
    return entries


def draw(panel, runs, key, x, unigram):
    """One panel: a value of the log against x. The loss, which is one step's, as a mean of nine
    lines."""
    for name, entries in runs.items():
        points = [(e[x], e[key]) for e in entries if e.get(key) is not None]
        xs, ys = zip(*points) if points else ((), ())
        means = [np.mean(ys[max(0, i - 4) : i + 5]) for i in range(len(ys))]
        panel.plot(xs, means if key == "loss" else ys, "-" if key == "loss" else ".-", label=name)
    if key != "loss":
        panel.set_yscale("log", subs=(2, 3, 5))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
    if unigram and key != "loss":
        panel.axhline(unigram, color="grey", linestyle="--", label="word frequency only")
    panel.set(xlabel=x, ylabel=SHOW[key])
    panel.grid(alpha=0.3, which="both")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("runs", nargs="+", help="folders of runs")
    add("--file", default="plot.svg", help="picture to write (default: plot.svg)")
    add("--show", nargs="+", choices=SHOW, default=list(SHOW), help="default: all three")
    add("--against", nargs="+", choices=AGAINST, default=AGAINST, help="default: all four")
    add("--unigram", type=float, help="perplexity of word frequencies alone: a dashed line")
    args = parser.parse_args()
    runs = {folder: read_run(folder) for folder in args.runs}
    size = 3.6 * len(args.against) + 1, 2.8 * len(args.show)
    figure = plt.figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(args.show), len(args.against), squeeze=False)
    for (i, j), panel in np.ndenumerate(panels):
        draw(panel, runs, args.show[i], args.against[j], args.unigram)
    panels[-1, 0].legend(fontsize=8)
    figure.savefig(args.file, dpi=120)


if __name__ == "__main__":
    main()
