"""Fine-tune an encoder on GLUE as the paper does (section 3.1, Table 5), or on a task of your own.

    python finetune.py --task RTE --glue GLUE_DIR --init out/tiny/hf --out out/rte
    python finetune.py --task all --glue GLUE_DIR --init out/x/hf --out out/glue --sweep --predict
    torchrun --nproc_per_node 8 finetune.py --task all ... --sweep    runs spread over 8 processes
    python finetune.py --train train.tsv --dev dev.tsv --init roberta-base/ --out out/mine

--init is the hf/ folder that train.py leaves or any Hugging Face RoBERTa folder. --lr,
--batch_size, --epochs and --seed take one value or several; several make a grid, --sweep fills
in Table 5's and five seeds. Of a grid, per seed the best run by the task's score counts; of the
seeds, the median. Each finished run is added to OUT/results.json at once, and the same command
goes on where it stopped. The best model of each task is in OUT/TASK/hf, with --predict beside the
leaderboard's files in OUT/predictions.

It does not download GLUE: its folders must lie in --glue as in the official archives. It does not
shard a model and applies no tricks (layer-wise rates, ensembles); 3ML's decoder is gone by now.

Shapes: B examples of a batch | T tokens of the longest, padded | C classes, 1 for regression
"""

import argparse
import itertools
import json
import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import atomic, command, fail, load_tokenizer, lock, seed_of, sha256_of
from model import Classifier, load_classifier, load_pretrained, save_pretrained
from train import (
    Machine,
    die_with_torchrun,
    keep_freed_memory,
    lost_process,
    lr_at,
    make_optimizer,
    out_of_memory,
    pick_device,
    pick_dtype,
)

# Metrics: predictions and labels are arrays; what is undefined is 0


def accuracy(p, y):
    return float((p == y).mean())


def f1(p, y):
    """Of class 1."""
    hits = ((p == 1) & (y == 1)).sum()
    return float(2 * hits / max(1, (p == 1).sum() + (y == 1).sum()))


def pearson(p, y):
    p, y = p - p.mean(), y - y.mean()
    norm = np.sqrt((p**2).sum() * (y**2).sum())
    return float((p * y).sum() / norm) if norm > 0 else 0.0


def matthews(p, y):
    """Matthews' correlation of two classes is Pearson's of their numbers."""
    return pearson(p.astype(float), y.astype(float))


def ranks(x):
    """Ranks from 1, those of equal values averaged."""
    _, which, count = np.unique(x, return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count - 1) / 2)[which]


def spearman(p, y):
    return pearson(ranks(p), ranks(y))


METRICS = dict(acc=accuracy, f1=f1, mcc=matthews, pearson=pearson, spearman=spearman)


# Tasks


@dataclass
class Task:
    """A task's files and columns (0-based: text a, text b or None, label)."""

    columns: tuple
    test_columns: tuple
    labels: tuple | None  # the words of the classes, None: regression
    metrics: tuple
    rows: int  # of the official training file
    header: bool = True  # of train and dev; a test file always has one
    dev: tuple = ("dev",)
    tests: tuple = (("test", ""),)  # file and what it adds to the task's name in a submission
    bad_rows: bool = False  # the official file has malformed rows, to be dropped and counted


TWO, ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
TASKS = {
    "MNLI": Task((8, 9, -1), (8, 9), ("entailment", "neutral", "contradiction"), ("acc",), 392_702,
                 dev=("dev_matched", "dev_mismatched"),
                 tests=(("test_matched", "-m"), ("test_mismatched", "-mm"))),
    "CoLA": Task((3, None, 1), (1, None), TWO, ("mcc",), 8_551, header=False),
    "SST-2": Task((0, None, 1), (1, None), TWO, ("acc",), 67_349),
    "MRPC": Task((3, 4, 0), (3, 4), TWO, ("f1", "acc"), 3_668),
    "STS-B": Task((7, 8, 9), (7, 8), None, ("pearson", "spearman"), 5_749),
    "QQP": Task((3, 4, 5), (1, 2), TWO, ("f1", "acc"), 363_846, bad_rows=True),
    "QNLI": Task((1, 2, 3), (1, 2), ENTAILMENT, ("acc",), 104_743),
    "RTE": Task((1, 2, 3), (1, 2), ENTAILMENT, ("acc",), 2_490),
}  # fmt: skip
FROM_MNLI = ("RTE", "STS-B", "MRPC")  # start from MNLI's model (Table 5)
LARGE_TASKS = ("QQP", "MNLI", "QNLI")
AVERAGE = "the mean of the eight tasks' scores, each the mean of its metrics, MNLI's of m and mm"


@dataclass
class Split:
    """Texts a, b (None for single sentences) and labels (int class, float score, or None) of a
    file."""

    a: list
    b: list | None
    labels: np.ndarray | None
    dropped: int = 0


def read_tsv(path):
    """The rows of a tab-separated file as lists of fields. No quoting, and only a newline ends a
    line: sentences hold unbalanced quotes, control characters, U+0085 and U+2028."""
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as e:
        fail(f"{path}: {e.strerror}")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        fail(f"{path}: empty")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(line.removesuffix(b"\r").decode("utf-8").split("\t"))
        except UnicodeDecodeError:
            fail(f"{path}: line {number} is not UTF-8")
    return rows


def read_split(path, columns, labels, header=True, bad_rows=False):
    """A Split of a file: columns as in Task, two of them if the file has no labels; labels the
    words of the classes, or None for numbers. A malformed row is an error, or dropped and counted
    with bad_rows."""
    rows = read_tsv(path)
    if len(rows) <= header:
        fail(f"{path}: holds no examples")
    width, a, b, y, dropped = len(rows[0]), [], [], [], 0
    need = max(c for c in columns if c is not None) + 1
    for number, fields in enumerate(rows[header:], 1 + header):
        if len(fields) != width or width < need:
            if bad_rows:
                dropped += 1
                continue
            fail(
                f"{path}: line {number} has {len(fields)} fields, not the {max(width, need)} it "
                "needs; mend the file"
            )
        a.append(fields[columns[0]].strip())
        b.append(fields[columns[1]].strip() if columns[1] is not None else None)
        if len(columns) == 3:
            y.append(read_label(fields[columns[2]].strip(), labels, f"{path}: line {number}"))
    y = np.array(y, np.float64 if labels is None else np.int64) if len(columns) == 3 else None
    return Split(a, b if columns[1] is not None else None, y, dropped)


def read_label(text, labels, where):
    if labels is not None:
        if text not in labels:
            fail(f"{where}: label {text!r} is not one of {', '.join(labels)}")
        return labels.index(text)
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    return value if np.isfinite(value) else fail(f"{where}: label {text!r} is not a number")


def read_task(name, glue):
    """(train Split, {dev file: Split}) of a GLUE task."""
    task, folder = TASKS[name], Path(glue) / name
    train = read_split(folder / "train.tsv", task.columns, task.labels, task.header, task.bad_rows)
    return train, {
        d: read_split(folder / f"{d}.tsv", task.columns, task.labels, task.header) for d in task.dev
    }


def files_of(name, args):
    """A task's training and development files."""
    if args.train:
        return [Path(args.train), Path(args.dev)]
    return [Path(args.glue) / name / f"{f}.tsv" for f in ("train", *TASKS[name].dev)]


def read_own(args):
    """A task of the user's own: (Task, train Split, {"dev": Split})."""
    columns = own_columns(args.train, True)
    labels = None
    if not args.regression:
        rows = [row for row in read_tsv(args.train)[1:] if len(row) > columns[2]]
        labels = tuple(sorted({row[columns[2]].strip() for row in rows}))
        if not 2 <= len(labels) <= 1000:
            fail(
                f"{args.train}: {len(labels)} different labels; classes need 2 or more "
                "(--regression for numbers)"
            )
    task = Task(columns, (), labels, ("pearson", "spearman") if args.regression else ("acc",), 0)
    train = read_split(args.train, columns, labels)
    dev = read_split(args.dev, own_columns(args.dev, True, columns[1] is not None), labels)
    return task, train, {"dev": dev}


def own_columns(path, labelled, pairs=None):
    """The columns of a file by its header; `pairs`, if given: must it have a sentence2."""
    head = read_tsv(path)[0]
    needed = ["sentence1"] + ["sentence2"] * bool(pairs) + ["label"] * labelled
    for name in needed:
        if name not in head:
            fail(f"{path}: line 1 names no column {name}; it has {', '.join(head)}")
    b = head.index("sentence2") if "sentence2" in head and pairs is not False else None
    columns = (head.index("sentence1"), b)
    return (*columns, head.index("label")) if labelled else columns


# Texts -> batches


def encode(split, tokenizer, vocab, max_len):
    """Token ids of every example: <s> a </s>, or <s> a </s></s> b </s>, cut to max_len from the
    longer text. Returns (list of lists, number that were cut)."""
    a = [e.ids for e in tokenizer.encode_batch(split.a, add_special_tokens=False)]
    if split.b is None:
        cut = sum(len(x) > max_len - 2 for x in a)
        return [[vocab.bos, *x[: max_len - 2], vocab.eos] for x in a], cut
    b = [e.ids for e in tokenizer.encode_batch(split.b, add_special_tokens=False)]
    examples, cut = [], 0
    for x, y in zip(a, b):
        room = max_len - 4
        if len(x) + len(y) > room:
            cut += 1
            n_x = min(len(x), max(room - len(y), (room + 1) // 2))
            x, y = x[:n_x], y[: room - n_x]
        examples.append([vocab.bos, *x, vocab.eos, vocab.eos, *y, vocab.eos])
    return examples, cut


def pad(examples, vocab, device):
    """tokens (B, T) and attention_mask (B, T), True at tokens, None if no example is padded."""
    length = max(map(len, examples))
    tokens = torch.tensor([x + [vocab.pad] * (length - len(x)) for x in examples])
    mask = torch.arange(length) < torch.tensor([[len(x)] for x in examples])
    return tokens.to(device), None if mask.all() else mask.to(device)


def epoch_batches(lengths, batch_size, seed, epoch, window=50):
    """Lists of example numbers: shuffled, sorted by length within windows of 50 batches so that
    little is padded, and the batches shuffled again."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    chunks = [order[i : i + window * batch_size] for i in range(0, len(order), window * batch_size)]
    order = np.concatenate([c[np.argsort(lengths[c], kind="stable")] for c in chunks])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


@torch.no_grad()
def predict(model, examples, vocab, machine, batch_size=64):
    """Logits (number of examples, C) as an array, in the order of the examples."""
    model.eval()
    order = np.argsort([len(x) for x in examples], kind="stable")
    logits = np.empty((len(examples), model.n_classes))
    for i in range(0, len(order), batch_size):
        tokens, mask = pad([examples[j] for j in order[i : i + batch_size]], vocab, machine.device)
        with machine.autocast():
            logits[order[i : i + batch_size]] = model(tokens, mask).float().cpu().numpy()
    return logits


# One run


def fine_tune(model, examples, labels, settings, vocab, machine, bar=None):
    """Train a Classifier; returns False if it diverged.

    examples: lists of ids; labels: an array; settings: lr, batch_size, epochs, seed."""
    lengths = np.array([len(x) for x in examples])
    steps = -(-len(examples) // settings["batch_size"]) * settings["epochs"]
    schedule = SimpleNamespace(lr=settings["lr"], max_steps=steps, warmup=0.06, weight_decay=0.1)
    optimizer = make_optimizer(model, schedule)
    scaler = torch.amp.GradScaler(machine.device.type) if machine.dtype == torch.float16 else None
    labels = torch.tensor(labels, dtype=torch.float32 if model.n_classes == 1 else torch.int64)
    model.train()
    step = 0
    for epoch in range(settings["epochs"]):
        for batch in epoch_batches(lengths, settings["batch_size"], settings["seed"], epoch):
            torch.manual_seed(seed_of(settings["seed"], 5, step))  # dropout
            tokens, mask = pad([examples[i] for i in batch], vocab, machine.device)
            y = labels[batch].to(machine.device)
            with machine.autocast():
                logits = model(tokens, mask).float()  # (B, C)
            regression = model.n_classes == 1
            loss = F.mse_loss(logits[:, 0], y) if regression else F.cross_entropy(logits, y)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, schedule)
            if scaler:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if bar is not None:
                bar.update(1)
        if not torch.isfinite(loss):
            return False
    return True


def score(logits, labels, task):
    """Metrics of one dev file, and whether the model gives every example the same answer."""
    p = logits[:, 0] if task.labels is None else logits.argmax(1)
    collapsed = bool(np.ptp(p) < (1e-3 if task.labels is None else 0.5))
    return {m: METRICS[m](p, labels) for m in task.metrics}, collapsed


def load_init(init):
    try:
        return load_pretrained(init)
    except ValueError as e:
        fail(f"--init {e}")


def build(init, reinit, n_classes, labels, seed, dropout):
    """A Classifier on the encoder in folder `init`, or on fresh weights of its shape."""
    config, encoder = load_init(init)
    config.dropout = dropout
    torch.manual_seed(seed_of(seed, 6))
    model = Classifier(config, n_classes)
    model.labels = labels
    if not reinit:
        model.encoder.load_state_dict(encoder.state_dict())
    return model


class Examples:
    """A task's texts as ids, made once for all of its runs."""

    def __init__(self, task, train, devs, tokenizer, vocab, max_len):
        self.task, self.n = task, len(train.a)
        self.labels, self.dropped = train.labels, train.dropped
        self.subset = 0 < self.n < 0.99 * task.rows
        self.train, self.cut = encode(train, tokenizer, vocab, max_len)
        self.devs = {
            name: (encode(d, tokenizer, vocab, max_len)[0], d.labels) for name, d in devs.items()
        }


def run_once(name, examples, settings, init, reinit, vocab, machine, dropout):
    """Fine-tune and score one point of the grid: (result for results.json, model)."""
    task, start = examples.task, time.perf_counter()
    n_classes = 1 if task.labels is None else len(task.labels)
    model = build(init, reinit, n_classes, task.labels, settings["seed"], dropout)
    model.to(machine.device)
    steps = -(-examples.n // settings["batch_size"]) * settings["epochs"]
    title = f"{name} " + " ".join(f"{k} {v}" for k, v in settings.items())
    with tqdm(total=steps, desc=title, disable=None, leave=False) as bar:
        fine = fine_tune(model, examples.train, examples.labels, settings, vocab, machine, bar)
    metrics, collapsed = {}, not fine
    for dev, (texts, labels) in examples.devs.items():
        found, same = dict.fromkeys(task.metrics, 0.0), True
        if fine:
            found, same = score(predict(model, texts, vocab, machine), labels, task)
        suffix = {"dev_matched": "-m", "dev_mismatched": "-mm"}.get(dev, "")
        metrics |= {m + suffix: v for m, v in found.items()}
        collapsed |= same
    result = dict(task=name, **settings, metrics=metrics, score=statistics.mean(metrics.values()))
    result |= dict(
        collapsed=collapsed, diverged=not fine, seconds=round(time.perf_counter() - start, 1)
    )
    return result, model


# Many runs


def read_results(out):
    path = Path(out) / "results.json"
    if not path.exists():
        return {"runs": []}
    try:
        results = json.loads(path.read_text())
        return {key: results[key] for key in ("start", "runs", "summary")}
    except (ValueError, KeyError, TypeError):
        fail(f"{path}: damaged; move it away to start again")


def record(out, start, result, model, tokenizer_file):
    """Add a finished run to results.json, and keep its model if it is the task's best so far."""
    with lock(out, wait=True, name=".record"):  # processes of one sweep take turns
        results = read_results(out)
        rivals = [r["score"] for r in results["runs"] if r["task"] == result["task"]]
        if not result["diverged"] and all(result["score"] > s for s in rivals):
            try:
                save_pretrained(model, Path(out) / result["task"] / "hf", tokenizer_file)
            except OSError as e:
                fail(f"{out}: {e}; free some space, then the same command goes on")
        results = {"start": start, "runs": [*results["runs"], result]}
        results["summary"] = summarise(results["runs"])
        with atomic(Path(out) / "results.json", "w") as f:
            json.dump(results, f, indent=1)


def summarise(runs):
    """Per task: of each seed the best run of the grid by score; the median, least and greatest of
    the seeds."""
    summary = {}
    for name in sorted({r["task"] for r in runs}, key=lambda t: [*TASKS, t].index(t)):
        best = {}
        for r in (r for r in runs if r["task"] == name):
            if r["seed"] not in best or r["score"] > best[r["seed"]]["score"]:
                best[r["seed"]] = r
        best = list(best.values())
        scores = [r["score"] for r in best]
        summary[name] = dict(
            score=statistics.median(scores), spread=[min(scores), max(scores)], seeds=len(best),
            metrics={
                m: statistics.median(r["metrics"][m] for r in best) for m in best[0]["metrics"]
            },
            collapsed=sum(r["collapsed"] and not r["diverged"] for r in runs if r["task"] == name),
            diverged=sum(r["diverged"] for r in runs if r["task"] == name),
            runs=sum(r["task"] == name for r in runs), subset=best[0].get("subset", False),
        )  # fmt: skip
    done = [summary[t]["score"] for t in TASKS if t in summary]
    subset = any(s["subset"] for s in summary.values())
    if done:
        complete = len(done) == len(TASKS) and not subset
        summary["average"] = dict(
            score=statistics.mean(done), definition=AVERAGE, complete=complete
        )
    return summary


def grid(name, args):
    """The runs of a task: Table 5's with --sweep, otherwise one, or whatever the flags span."""
    large = name in LARGE_TASKS
    seed, lr, batch_size, epochs = [0], [5e-5], [32], [3]
    if args.sweep:
        seed, lr = range(5), [5e-5, 8e-5] if large else [1e-5, 3e-5, 5e-5, 8e-5]
        batch_size, epochs = ([32], [3, 5]) if large else ([16, 32], [3, 5, 10])
    points = itertools.product(
        args.seed or seed, args.lr or lr, args.batch_size or batch_size, args.epochs or epochs
    )
    return [dict(zip(("seed", "lr", "batch_size", "epochs"), point)) for point in points]


def print_table(results, missing):
    """In the manner of Table 3: every metric in per cent, the median of the seeds."""
    summary = results["summary"]
    print(
        f"\n{'task':<9}{'metrics (%)':<34}{'score':>7}{'spread':>14}{'seeds':>7}{'runs':>6}  notes"
    )
    for name, s in summary.items():
        if name == "average":
            continue
        metrics = "  ".join(f"{m} {100 * v:.1f}" for m, v in s["metrics"].items())
        spread = f"{100 * s['spread'][0]:.1f}-{100 * s['spread'][1]:.1f}"
        notes = ["subset"] * s["subset"]
        notes += [f"{s[what]} {what}" for what in ("diverged", "collapsed") if s[what]]
        cells = f"{100 * s['score']:>7.1f}{spread:>14}{s['seeds']:>7}{s['runs']:>6}"
        print(f"{name:<9}{metrics:<34}{cells}  {', '.join(notes)}")
    for name in missing:
        print(f"{name:<9}missing")
    of = sum(t in summary for t in TASKS)
    if of > 1:
        complete = summary["average"]["complete"]
        note = "" if complete else f", not GLUE's: {of} of 8 tasks, subsets included"
        print(f"{'average':<43}{100 * summary['average']['score']:>7.1f}  ({AVERAGE}{note})")


def same_start(names, args):
    """Results of different encoders or texts do not belong in one folder: what differs is an
    error. Returns what to compare with: of all runs, and {task: the hashes of its files}."""
    start = dict(init=os.path.realpath(args.init), reinit=args.reinit, max_len=args.max_len)
    start |= dict(dropout=args.dropout, from_mnli=args.from_mnli, regression=args.regression)
    weights = [Path(args.init) / f for f in ("pytorch_model.bin", "model.safetensors")]
    start["weights"] = sha256_of(next(filter(Path.is_file, weights)))
    texts = {name: [sha256_of(f) for f in files_of(name, args)] for name in names}
    results, other = read_results(args.out), "choose another --out"
    for name, new in start.items():
        old = results.get("start", start).get(name)
        if old != new and name == "weights":
            fail(
                f"--init {args.init}: its weights are not those of the runs in {args.out}; {other}"
            )
        if old != new:
            fail(f"--{name} {new}: {args.out} has results of {old}; {other}")
    for r in results["runs"]:
        if r["task"] in texts and r.get("texts") != texts[r["task"]]:
            fail(f"{args.out}: its runs of {r['task']} were made on other texts; {other}")
    return start, texts


def run_tasks(names, args, load, tokenizer, vocab, machine):
    """All runs of some tasks that results.json does not have yet, shared out over the processes."""
    (start, texts), keys = same_start(names, args), ("task", "seed", "lr", "batch_size", "epochs")
    old = [[r[k] for k in keys] for r in read_results(args.out)["runs"]]
    every = [dict(task=name) | point for name in names for point in grid(name, args)]
    runs = [r for r in every if [r[k] for k in keys] not in old]
    if machine.rank == 0 and every:
        there = f"{len(every) - len(runs)} of {len(every)} runs are there"
        print(f"{', '.join(names)}: {there}, {len(runs)} are to be made", flush=True)
    if machine.world > 1:
        dist.barrier()  # everybody has read what there is before anybody adds to it
    parent, made = Path(args.out) / "MNLI" / "hf", {}
    for i in range(machine.rank, len(runs), machine.world):
        settings = dict(runs[i])
        name = settings.pop("task")
        if name not in made:
            made = {name: Examples(*load(name), tokenizer, vocab, args.max_len)}
            if all(r["task"] != name for r in runs[:i]):  # once, by whoever has the first run
                describe(name, made[name], args.max_len)
        from_mnli = name in FROM_MNLI and args.from_mnli == "yes" and parent.is_dir()
        from_mnli = from_mnli and not args.train
        init, reinit = (parent, False) if from_mnli else (Path(args.init), args.reinit)
        e = made[name]
        result, model = run_once(name, e, settings, init, reinit, vocab, machine, args.dropout)
        result |= dict(from_mnli=from_mnli, subset=e.subset, cut=e.cut, dropped=e.dropped)
        result["texts"] = texts[name]
        record(args.out, start, result, model, Path(args.init) / "tokenizer.json")
        metrics = "  ".join(f"{m} {100 * v:.1f}" for m, v in result["metrics"].items())
        flag = "  DIVERGED" * result["diverged"] or "  COLLAPSED" * result["collapsed"]
        flag += "  from MNLI's" * from_mnli
        point = "  ".join(f"{k} {v}" for k, v in settings.items())
        print(f"{name}  {point}:  {metrics}{flag}  ({result['seconds']:.0f} s)", flush=True)
    if machine.world > 1:
        dist.barrier()


def describe(name, examples, max_len):
    """What was read, and what was not: nothing is dropped silently."""
    text = f"{name}: {examples.n:,} examples{' (subset)' * examples.subset}, "
    text += f"{examples.cut:,} cut to {max_len} tokens"
    text += f", {examples.dropped} malformed rows dropped" if examples.dropped else ""
    print(text, flush=True)


# The leaderboard's files


def write_predictions(path, logits, labels, words):
    """`index<TAB>prediction`, index from 0; words for classes, numbers from 0 to 5 for STS-B."""
    if labels is None:
        answers = [f"{x:.3f}" for x in (np.clip(logits[:, 0], 0, 5) if words else logits[:, 0])]
    else:
        answers = [labels[i] for i in logits.argmax(1)]
    with atomic(path, "w") as f:
        f.write("index\tprediction\n" + "".join(f"{i}\t{x}\n" for i, x in enumerate(answers)))
    print(f"{path}: {len(answers):,} predictions")


def predict_file(directory, path, columns, labels, out, tokenizer, vocab, machine, args, glue=True):
    """Predict a test file with the classifier in `directory`."""
    try:
        model = load_classifier(directory, 1 if labels is None else len(labels))
    except ValueError as e:
        fail(f"no predictions for {path}: {e}")
    model.to(machine.device)
    examples, _ = encode(read_split(path, columns, None), tokenizer, vocab, args.max_len)
    write_predictions(out, predict(model, examples, vocab, machine), labels, glue)


def submit(names, args, tokenizer, vocab, machine):
    """The leaderboard's files for every task that has a model and a test file; says which have
    not."""
    folder = Path(args.out) / "predictions"
    for name in names:
        task = TASKS[name]
        files = [
            (f"{name}/{f}.tsv", f"{name}{tag}.tsv", task.test_columns) for f, tag in task.tests
        ]
        if name == "MNLI":
            files.append(("diagnostic/diagnostic.tsv", "AX.tsv", (1, 2)))
        for path, answers, columns in files:
            path, model = Path(args.glue) / path, Path(args.out) / name / "hf"
            needed = [p for p in (path, model / "config.json") if not p.is_file()]
            if needed:
                print(f"{needed[0]}: missing, so no {answers}")
                continue
            what = (path, columns, task.labels, folder / answers)
            predict_file(model, *what, tokenizer, vocab, machine, args)


# The command


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    parser.add_argument(
        "--task", choices=[*TASKS, "all"], help="a GLUE task, or all whose files are there"
    )
    parser.add_argument("--glue", metavar="DIR", help="folder with GLUE's folders CoLA, SST-2, ...")
    parser.add_argument(
        "--init", metavar="DIR", required=True, help="Hugging Face RoBERTa folder to start from"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for results and models")
    parser.add_argument("--lr", type=float, nargs="+", help="peak learning rate(s) (default 5e-5)")
    parser.add_argument("--batch_size", type=int, nargs="+", help="examples of a step (default 32)")
    parser.add_argument(
        "--epochs", type=int, nargs="+", help="passes over the training file (default 3)"
    )
    parser.add_argument(
        "--seed", type=int, nargs="+", help="of head, order and dropout (default 0)"
    )
    parser.add_argument(
        "--max_len",
        type=int,
        help="tokens of an example (default 128, or the encoder's n_positions)",
    )
    parser.add_argument(
        "--dropout", type=float, default=0.1, help="while fine-tuning (default 0.1)"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="Table 5's grid and five seeds, where not given"
    )
    parser.add_argument("--predict", action="store_true", help="write the leaderboard's files")
    parser.add_argument(
        "--reinit", action="store_true", help="control: fresh weights of --init's shape"
    )
    parser.add_argument(
        "--from_mnli",
        choices=("yes", "no"),
        default="yes",
        help="start RTE, STS-B and MRPC from MNLI's model in --out, if there is one (default yes)",
    )
    parser.add_argument(
        "--train",
        metavar="FILE",
        help="a task of your own: TSV with header sentence1, [sentence2,] label",
    )
    parser.add_argument("--dev", metavar="FILE", help="its development file")
    parser.add_argument(
        "--test", metavar="FILE", help="its test file, labels or not: predictions for every row"
    )
    parser.add_argument("--regression", action="store_true", help="its labels are numbers")
    parser.add_argument(
        "--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="(default auto)"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="(default auto)"
    )
    args = parser.parse_args(argv)
    for name in ("dev", "test", "regression"):
        if args.task and getattr(args, name):
            fail(f"--{name}: is for a task of your own, with --train; leave it or --task out")
    if args.train and (args.task or args.glue or args.predict):
        fail("--train: is for a task of your own; leave --task, --glue and --predict out")
    args.seed = args.seed and list(dict.fromkeys(args.seed))
    if not args.train and not args.task:
        fail("--task: name a GLUE task or all, or give --train and --dev of your own")
    if args.task and not args.glue:
        fail("--glue: missing; name the folder that holds GLUE's folders")
    if args.train and not args.dev:
        fail("--dev: missing; a task of your own needs a development file")
    for name in ("lr", "batch_size", "epochs"):
        if not all(0 < x < float("inf") for x in getattr(args, name) or [1]):
            fail(f"--{name} {getattr(args, name)}: must be above 0")
    if not 0 <= args.dropout < 1:
        fail(f"--dropout {args.dropout}: must be in [0, 1)")
    if min(args.seed or [0]) < 0:
        fail(f"--seed {args.seed}: must not be negative")
    if args.max_len is not None and args.max_len < 8:
        fail(f"--max_len {args.max_len}: must be at least 8")
    return args


def machine_for(args):
    """Each process has its own runs, so it is alone on its device."""
    die_with_torchrun()
    keep_freed_memory()
    device, world = pick_device(args.device), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return Machine(int(os.environ.get("RANK", 0)), world, device, pick_dtype(args.dtype, device))


def main(argv=None):
    args = parse(argv)
    tokenizer, vocab = load_tokenizer(Path(args.init) / "tokenizer.json")
    machine = machine_for(args)
    try:
        shape = load_init(args.init)[0]  # a folder that cannot be read fails now
        args.max_len = args.max_len or min(128, shape.n_positions)
        if args.max_len > shape.n_positions:
            most = f"{shape.n_positions} positions"
            fail(f"--max_len {args.max_len}: the encoder in {args.init} has {most}")
        if vocab.size > shape.vocab_size:
            fail(f"--init {args.init}: its tokenizer.json has more words than its encoder")
        with lock(args.out) if machine.rank == 0 else nullcontext():
            (own_task if args.train else glue_tasks)(args, tokenizer, vocab, machine)
    except (RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            advice = "a lower --batch_size or --max_len takes less"
            fail(f"out of memory on {machine.device}; {advice}", everywhere=True)
        if not lost_process(e):
            raise
        fail("another process ended; the same command keeps the finished runs of results.json")
    finally:
        if machine.world > 1:
            dist.destroy_process_group()


def own_task(args, tokenizer, vocab, machine):
    name = Path(args.train).stem
    own = read_own(args)
    pairs = own[0].columns[1] is not None
    test_columns = own_columns(args.test, False, pairs) if args.test else None
    run_tasks([name], args, lambda _: own, tokenizer, vocab, machine)
    if machine.rank == 0:
        print_table(read_results(args.out), [])
        if args.test:
            model = Path(args.out) / name / "hf"
            answers = Path(args.out) / "predictions" / f"{Path(args.test).stem}.tsv"
            what = (args.test, test_columns, own[0].labels, answers)
            predict_file(model, *what, tokenizer, vocab, machine, args, glue=False)


def glue_tasks(args, tokenizer, vocab, machine):
    names = [*TASKS] if args.task == "all" else [args.task]
    missing = {name: [str(f) for f in files_of(name, args) if not f.is_file()] for name in names}
    there = [name for name in names if not missing[name]]
    absent = [name for name in names if missing[name]]
    if not there:
        fail(f"--glue {args.glue}: has the files of none of {', '.join(names)}")
    if machine.rank == 0:
        for name in absent:
            print(f"{name}: missing {', '.join(missing[name])}")
        print(f"running {', '.join(there)}", flush=True)

    def load(name):
        return TASKS[name], *read_task(name, args.glue)

    for stage in ([n for n in there if n == "MNLI"], [n for n in there if n != "MNLI"]):
        run_tasks(stage, args, load, tokenizer, vocab, machine)
    if machine.rank == 0:
        print_table(read_results(args.out), absent)
        if args.predict:
            submit(there, args, tokenizer, vocab, machine)


if __name__ == "__main__":
    command(main, "interrupted; the same command keeps the finished runs of results.json")
