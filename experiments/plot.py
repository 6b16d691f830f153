"""Draws runs of train.py side by side: loss and masked perplexity against steps, tokens, FLOPs and seconds.

    python experiments/plot.py out/a out/b                         writes plot.svg
    python experiments/plot.py out/tiny --file tiny.png --against steps --unigram 626

A run is a folder with log.jsonl and config.json. FLOPs are those of forward and backward (3 x flops.forward).
Seconds are those of training, from the log's tokens per second, without evaluations and checkpoints.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flops  # noqa: E402
from data import counts  # noqa: E402
from train import Config  # noqa: E402

LINES = {"loss": "training loss (nats)", "ppl_masked": "masked perplexity", "ppl_masked_15": "... at 15%"}
AXES = ("steps", "tokens", "FLOPs", "seconds")


def read_run(folder):
    """[log entry with "steps", "tokens", "FLOPs" and "seconds"] of a run."""
    config = Config(**json.loads((Path(folder) / "config.json").read_text()))
    k, n_m, _ = counts(config.seq_len, config.mask_rate, config.strategy)
    work = 3 * config.batch_size * flops.forward(config, config.seq_len, n_m, k)
    entries, step, seconds = [], 0, 0.0
    for line in (Path(folder) / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        tokens = config.batch_size * config.seq_len
        if "tokens_per_s" in entry:
            seconds += (entry["step"] - step) * tokens / entry["tokens_per_s"]
            step = entry["step"]
        entry |= dict(steps=entry["step"], tokens=entry["step"] * tokens, FLOPs=entry["step"] * work)
        entries.append(entry | dict(seconds=seconds))
    return entries


def smooth(y):
    """Means of nine neighbouring lines of the log, each of which is the loss of one step."""
    windows = [y[max(0, i - 4) : i + 5] for i in range(len(y))]
    return [sum(w) / len(w) for w in windows]


def draw(runs, axes, unigram=None):
    """A figure with a row for each of LINES and a column for each axis. runs: {name: entries}."""
    shape = (len(LINES), len(axes))
    size = (3.6 * len(axes) + 1, 2.6 * len(LINES))
    figure, panels = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for row, (key, label) in zip(panels, LINES.items()):
        for panel, x in zip(row, axes):
            for name, entries in runs.items():
                points = [(e[x], e[key]) for e in entries if e.get(key) is not None]
                if points:
                    xs, ys = zip(*points)
                    marker = dict(marker="o", markersize=3) if "ppl" in key else {}
                    panel.plot(xs, ys if "ppl" in key else smooth(ys), label=name, **marker)
            if unigram and "ppl" in key:
                panel.axhline(unigram, color="grey", linestyle="--", label="word frequency only")
            panel.set(xlabel=x, ylabel=label, yscale="log" if "ppl" in key else "linear")
            panel.grid(alpha=0.3, which="both")
    panels[1][0].legend(fontsize=8)
    return figure


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--file", default="plot.svg", help="picture to write (default: plot.svg)")
    parser.add_argument("--against", nargs="+", choices=AXES, default=AXES, help="default: all four")
    parser.add_argument("--unigram", type=float, help="perplexity of word frequencies alone, a dashed line")
    args = parser.parse_args()
    runs = {Path(folder).name: read_run(folder) for folder in args.runs}
    draw(runs, args.against, args.unigram).savefig(args.file, dpi=120)


if __name__ == "__main__":
    main()
