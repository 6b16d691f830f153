"""Fine-tune an encoder on GLUE as the paper does (section 3.1, Table 5), or on a task of your own.

    python finetune.py --task RTE --glue GLUE_DIR --init out/tiny/hf --out out/rte
    python finetune.py --task all --glue GLUE_DIR --init out/x/hf --out out/glue --sweep --predict
    torchrun --nproc_per_node 8 finetune.py --task all ... --sweep    the runs spread over 8 processes
    python finetune.py --task mine --glue tasks --init roberta-base/ --out out/mine    a task of your own

--init is the hf/ folder of a train.py run, or any Hugging Face RoBERTa folder. --lr, --batch_size, --epochs
and --seed take several values, which make a grid; --sweep is Table 5's grid with five seeds. For each seed
the best run of the grid counts, by the task's score; then the median over the seeds is taken. Every finished
run is a line of OUT/results.jsonl, so that the same command resumes after the last one. The best model of
each task is in OUT/TASK/hf, and with --predict the leaderboard's files are in OUT/predictions.

A task of your own is a folder with train.tsv, dev.tsv and, for --predict, test.tsv: tab-separated, with the
columns sentence1, label and, for pairs, sentence2 named in line 1. This file does not download GLUE or use
layer-wise learning rates or ensembles.

Shapes: B examples of a batch | T tokens of the longest, the others padded | C classes, 1 for regression"""

import itertools
import json
import os
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import Vocab, command, fail, load_tokenizer, lock, parse_flags, write
from model import Classifier, load_pretrained, save_pretrained
from train import lr_at, make_optimizer, this_machine, update

# Metrics of predictions p and labels y, arrays; an undefined metric is 0


def accuracy(p, y):
    return float((p == y).mean())


def f1(p, y):
    """Of class 1."""
    hits = ((p == 1) & (y == 1)).sum()
    return float(2 * hits / max(1, (p == 1).sum() + (y == 1).sum()))


def pearson(p, y):
    """Of the numbers of two classes, this is Matthews' correlation."""
    p, y = p - p.mean(), y - y.mean()
    norm = np.sqrt((p**2).sum() * (y**2).sum())
    return float((p * y).sum() / norm) if norm > 0 else 0.0


def ranks(x):
    """Ranks from 1; equal values have the average of theirs."""
    _, which, count = np.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[which]


def spearman(p, y):
    return pearson(ranks(p), ranks(y))


METRICS = dict(acc=accuracy, f1=f1, mcc=pearson, pearson=pearson, spearman=spearman)


# Tasks


@dataclass
class Task:
    """A task's columns, classes, metrics and files (in GLUE_DIR/TASK)."""

    a: str  # the column of the text, or of the first of two
    b: str | None
    label: str
    labels: tuple | None  # names of the classes; None: the labels are numbers
    metrics: tuple
    train: str = "train.tsv"
    dev: tuple = ("dev.tsv",)
    tests: tuple = ("test.tsv",)
    answers: tuple = ()  # names of the leaderboard's files, one for each test file
    header: tuple = ()  # names of the columns, if the train and dev files have no header
    bad_rows: bool = False  # the official file has malformed rows, which are dropped and counted


S1, S2, BINARY, ENTAILMENT = "sentence1", "sentence2", ("0", "1"), ("entailment", "not_entailment")
TASKS = {
    "MNLI": Task(S1, S2, "gold_label", ("entailment", "neutral", "contradiction"), ("acc",),
                 dev=("dev_matched.tsv", "dev_mismatched.tsv"),
                 tests=("test_matched.tsv", "test_mismatched.tsv", "../diagnostic/diagnostic.tsv"),
                 answers=("MNLI-m", "MNLI-mm", "AX")),
    "CoLA": Task("sentence", None, "label", BINARY, ("mcc",),
                 header=("source", "label", "mark", "sentence")),
    "SST-2": Task("sentence", None, "label", BINARY, ("acc",)),
    "MRPC": Task("#1 String", "#2 String", "Quality", BINARY, ("f1", "acc")),
    "STS-B": Task(S1, S2, "score", None, ("pearson", "spearman")),
    "QQP": Task("question1", "question2", "is_duplicate", BINARY, ("f1", "acc"), bad_rows=True),
    "QNLI": Task("question", "sentence", "label", ENTAILMENT, ("acc",)),
    "RTE": Task(S1, S2, "label", ENTAILMENT, ("acc",)),
}  # fmt: skip
FROM_MNLI = ("RTE", "STS-B", "MRPC")  # these start from MNLI's model (Table 5)
GRID = dict(seed=range(5), lr=[1e-5, 3e-5, 5e-5, 8e-5], batch_size=[16, 32], epochs=[3, 5, 10])  # Table 5
LARGE_GRID = GRID | dict(lr=[5e-5, 8e-5], batch_size=[32], epochs=[3, 5])  # of MNLI, QQP and QNLI
AVERAGE = "GLUE's is over all eight; a task's score is the mean of its metrics, MNLI's of m and mm"


def read_table(path):
    """The rows of a tab-separated file as lists of fields. There is no quoting, and only a newline ends a
    line: sentences contain unbalanced quotes, control characters, U+0085 and U+2028."""
    content = Path(path).read_bytes()
    try:
        lines = content.decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as e:
        fail(f"{path}: line {content.count(10, 0, e.start) + 1} is not UTF-8 text")
    return [line.removesuffix("\r").split("\t") for line in lines]


def read_split(path, task, labelled=True):
    """(texts, or pairs of texts; class numbers or scores; how many malformed rows were dropped) of a file. A
    malformed row is an error, except where the official file has some."""
    rows, has_header = read_table(path), not (task.header and labelled)
    names = rows.pop(0) if has_header else list(task.header)
    wanted = [task.a] + [task.b] * bool(task.b) + [task.label] * labelled
    for name in wanted:
        if name not in names:
            fail(f"{path}: line 1 names no column {name!r}, only {', '.join(names)}")
    texts, labels = [], []
    for number, row in enumerate(rows, 1 + has_header):
        if len(row) == len(names):
            a, *b = (row[names.index(name)].strip() for name in wanted)
            if labelled:
                labels.append(read_label(b.pop(), task, f"{path}: line {number}"))
            texts.append((a, *b) if b else a)
        elif not task.bad_rows:
            fail(f"{path}: line {number} has {len(row)} fields, not {len(names)}; fix the file")
    if not texts:
        fail(f"{path}: contains no examples")
    return texts, np.array(labels), len(rows) - len(texts)


def read_label(text, task, where):
    """The number of a class, or a score."""
    with suppress(ValueError):
        label = task.labels.index(text) if task.labels else float(text)
        if np.isfinite(label):
            return label
    expected = f"one of {', '.join(task.labels)}" if task.labels else "a number"
    fail(f"{where}: label {text!r} is not {expected}")


def own_task(path, regression):
    """The Task of a training file with columns sentence1, label and, for pairs, sentence2."""
    names, *rows = read_table(path)
    task = Task(S1, S2 if S2 in names else None, "label", None, ("pearson", "spearman"))
    if "label" in names and not regression:
        column, task.metrics = names.index("label"), ("acc",)
        task.labels = tuple(sorted({row[column].strip() for row in rows if len(row) == len(names)}))
        if len(task.labels) < 2:
            fail(f"{path}: only the label {task.labels}, so there is nothing to learn")
    return task


def encode(texts, tokenizer, max_len):
    """Token ids of every example: <s> a </s>, or <s> a </s></s> b </s>, cut to max_len at the end of the
    longer text. Returns (list of lists, how many were cut)."""
    tokenizer.enable_truncation(max_len)
    encodings = tokenizer.encode_batch(texts)
    return [e.ids for e in encodings], sum(len(e.overflowing) > 0 for e in encodings)


def pad(examples, device):
    """tokens (B, T) and attention_mask (B, T), False at padding."""
    examples = [torch.tensor(x) for x in examples]
    tokens = pad_sequence(examples, batch_first=True, padding_value=Vocab.pad).to(device)
    return tokens, tokens != Vocab.pad


def batches_of(examples, batch_size, rng=None):
    """Arrays of example numbers. Examples of a batch have similar lengths, so that there is little padding.
    An rng shuffles the batches, and varies the lengths by a tenth so that other examples come together."""
    lengths = np.array([len(x) for x in examples])
    order = np.argsort(lengths * rng.uniform(0.9, 1.1, len(lengths)) if rng else lengths)
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))] if rng else batches


@torch.no_grad()
def predict(model, examples, machine, batch_size=64):
    """Logits (number of examples, C) as an array, in the order of the examples."""
    model.eval()
    logits = np.empty((len(examples), len(model.labels)))
    for batch in batches_of(examples, batch_size):
        tokens, mask = pad([examples[i] for i in batch], machine.device)
        with machine.autocast():
            logits[batch] = model(tokens, mask).float().cpu().numpy()
    return logits


def fine_tune(model, examples, labels, point, machine, title=""):
    """Train a Classifier on lists of ids and an array of labels; point: lr, batch_size, epochs, seed."""
    regression, rng = len(model.labels) == 1, np.random.default_rng(point["seed"])
    labels = torch.tensor(labels, dtype=torch.float32 if regression else torch.int64)
    batches = [b for _ in range(point["epochs"]) for b in batches_of(examples, point["batch_size"], rng)]
    schedule = SimpleNamespace(lr=point["lr"], max_steps=len(batches), warmup=0.06, weight_decay=0.1)
    optimizer = make_optimizer(model, schedule)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype is torch.float16)
    model.train()
    for step, batch in enumerate(tqdm(batches, title, disable=None, leave=False)):
        tokens, mask = pad([examples[i] for i in batch], machine.device)
        y = labels[batch].to(machine.device)  # (B,)
        with machine.autocast():
            logits = model(tokens, mask).float()  # (B, C)
        loss = F.mse_loss(logits[:, 0], y) if regression else F.cross_entropy(logits, y)
        scaler.scale(loss).backward()
        update(optimizer, scaler, lr_at(step, schedule))


def load_examples(name, task, flags, tokenizer):
    """[(ids, labels) of a task's training file, the same of each development file]."""
    splits = []
    for file in (task.train, *task.dev):
        texts, labels, dropped = read_split(Path(flags.glue, name, file), task)
        ids, cut = encode(texts, tokenizer, flags.max_len)
        print(f"{name}/{file}: {len(ids):,} examples, {cut:,} of them cut; {dropped} dropped", flush=True)
        splits.append((ids, labels))
    return splits


def run_once(title, name, task, splits, point, init, machine):
    """Fine-tune at one point of the grid and evaluate: (a line of results.jsonl, model)."""
    train, *devs = splits
    config, encoder = load_pretrained(init)
    config.dropout = 0.1  # Table 5
    torch.manual_seed(point["seed"])  # the head's weights, and dropout
    model = Classifier(config, len(task.labels or ["score"]))
    model.labels = task.labels or ["score"]
    model.encoder.load_state_dict(encoder.state_dict())
    model.to(machine.device)
    fine_tune(model, *train, point, machine, title)
    metrics, collapsed = {}, False
    for (examples, labels), suffix in zip(devs, ("-m", "-mm") if len(devs) > 1 else ("",)):
        logits = np.nan_to_num(predict(model, examples, machine))
        p = logits.argmax(1) if task.labels else logits[:, 0]
        metrics |= {m + suffix: METRICS[m](p, labels) for m in task.metrics}
        collapsed |= bool(np.ptp(p) < 1e-3)  # the same answer for all examples
    score = statistics.mean(metrics.values())
    line = dict(
        title=title, task=name, **point, start=str(init), metrics=metrics, score=score, collapsed=collapsed
    )
    return line, model


# Many runs


def grid(name, flags):
    """The runs of a task, {title: point}: one, or Table 5's with --sweep, or those of the given flags."""
    values = dict(seed=[0], lr=[5e-5], batch_size=[32], epochs=[3])
    if flags.sweep:
        values = LARGE_GRID if name in ("MNLI", "QQP", "QNLI") else GRID
    points = itertools.product(*(getattr(flags, x) or values[x] for x in values))
    title = name + " seed {} lr {} batch_size {} epochs {}"
    return {title.format(*point): dict(zip(values, point)) for point in points}


def read_results(flags):
    """{title: run} of the lines of results.jsonl. Runs with other settings in it are an error."""
    path, results = Path(flags.out) / "results.jsonl", {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            run = json.loads(line)
        except ValueError:
            fail(f"{path}: line {number} is damaged; delete it to repeat that run")
        for name, value in run["settings"].items():
            if getattr(flags, name) != value:
                fail(f"--{name}: the runs in {path} have {value}; choose another --out")
        results[run["title"]] = run
    return results


def record(run, model, flags):
    """Append a run to results.jsonl, after saving its model if it is the task's best so far."""
    with lock(flags.out, wait=True):  # processes that share a sweep take turns
        rivals = [r for r in read_results(flags).values() if r["task"] == run["task"]]
        if all((r["collapsed"], -r["score"]) > (run["collapsed"], -run["score"]) for r in rivals):
            save_pretrained(model, Path(flags.out, run["task"], "hf"), Path(flags.init, "tokenizer.json"))
        with open(Path(flags.out) / "results.jsonl", "a") as f:
            f.write(json.dumps(run) + "\n")
    notes = " collapsed" * run["collapsed"] + f" from {run['start']}" * (run["start"] != flags.init)
    print(f"{run['title']}: {percent(run['metrics'])}{notes}", flush=True)


def wait_for(names, flags):
    """Wait until results.jsonl has all runs of these tasks, which other processes may still be making."""
    while not {title for name in names for title in grid(name, flags)} <= read_results(flags).keys():
        time.sleep(5)


def start_of(name, tasks, flags):
    """The folder that a task's runs start from: MNLI's best model for three tasks, if there is one."""
    parent = Path(flags.out, "MNLI", "hf")
    if name not in FROM_MNLI:
        return flags.init
    if "MNLI" in tasks:
        wait_for(["MNLI"], flags)
    return parent if parent.exists() else flags.init


def summarize(runs):
    """Per task: for each seed the best run of the grid by score; over the seeds, the median and the range."""
    summary = {}
    for name in dict.fromkeys(run["task"] for run in runs):
        mine = sorted((run for run in runs if run["task"] == name), key=lambda run: run["score"])
        best = list({run["seed"]: run for run in mine}.values())  # the last one of each seed
        scores = [run["score"] for run in best]
        metrics = {m: statistics.median(run["metrics"][m] for run in best) for m in best[0]["metrics"]}
        summary[name] = dict(
            score=statistics.median(scores), range=[min(scores), max(scores)], metrics=metrics,
            seeds=len(best), runs=len(mine), collapsed=sum(run["collapsed"] for run in mine))  # fmt: skip
    return summary


def percent(metrics):
    return "  ".join(f"{m} {100 * v:.1f}" for m, v in metrics.items())


def print_table(summary):
    """As Table 3, in percent: the median and the range of the score over the seeds, then every metric."""
    for name, s in summary.items():
        score = percent(dict(score=s["score"], min=s["range"][0], max=s["range"][1]))
        numbers = f"seeds {s['seeds']}  runs {s['runs']}  collapsed {s['collapsed']}"
        print(f"{name:<7}{score}  {numbers}  {percent(s['metrics'])}")


def write_predictions(name, task, flags, tokenizer, machine):
    """Predict a task's test files with its best model: `index<TAB>prediction`, index from 0, the names of the
    classes or a number (for STS-B from 0 to 5)."""
    for test, answers in zip(task.tests, task.answers or [name]):
        path, folder = Path(flags.glue, name, test), Path(flags.out, name, "hf")
        answers = Path(flags.out, "predictions", f"{answers}.tsv")
        if missing := [str(x) for x in (folder, path) if not x.exists()]:
            print(f"{missing[0]} is missing, so there is no {answers}")
            continue
        model = load_pretrained(folder, len(task.labels or ["score"]))[1].to(machine.device)
        texts, *_ = read_split(path, task, labelled=False)
        logits = predict(model, encode(texts, tokenizer, flags.max_len)[0], machine)
        scores = logits[:, 0].clip(0, 5) if name == "STS-B" else logits[:, 0]
        predictions = [f"{x:.3f}" for x in scores]
        if task.labels:
            predictions = [task.labels[i] for i in logits.argmax(1)]
        write(answers, "index\tprediction\n" + "".join(f"{i}\t{x}\n" for i, x in enumerate(predictions)))
        print(f"{answers}: {len(predictions):,} predictions")


# The command


@dataclass
class Flags:
    task: str  # a folder in --glue: a GLUE task or one of your own; all: GLUE's whose files are there
    glue: str  # folder with GLUE's folders CoLA, SST-2, ..., or with your own
    init: str  # Hugging Face RoBERTa folder to start from
    out: str  # folder for results and models
    lr: list[float] = None  # peak learning rates (default: 5e-5)
    batch_size: list[int] = None  # examples of a step (default: 32)
    epochs: list[int] = None  # passes over the training file (default: 3)
    seed: list[int] = 0  # seeds of head, order and dropout
    sweep: bool = False  # Table 5's grid and five seeds for what is not given
    max_len: int = None  # tokens of an example (default: 128, or the encoder's n_positions if fewer)
    predict: bool = False  # predict the test files, as the leaderboard wants them
    regression: bool = False  # the labels of your own task are numbers
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # precision


def find_tasks(flags):
    """{name: Task} of what is to be done."""
    tasks = {}
    for name in TASKS if flags.task == "all" else [flags.task]:
        path = Path(flags.glue, name, "train.tsv")
        if path.is_file():
            tasks[name] = TASKS.get(name) or own_task(path, flags.regression)
        else:
            print(f"{path} is missing")
    return tasks or fail(f"--glue {flags.glue}: has no {flags.task}/train.tsv")


@command
def main(argv):
    flags = parse_flags(Flags, argv, __doc__)
    shape, _ = load_pretrained(flags.init)
    tokenizer, _ = load_tokenizer(Path(flags.init) / "tokenizer.json")
    flags.max_len = flags.max_len or min(128, shape.n_positions)
    if not 8 <= flags.max_len <= shape.n_positions:
        fail(f"--max_len {flags.max_len}: must be from 8 to {shape.n_positions}, the encoder's positions")
    tasks, machine = find_tasks(flags), this_machine("auto", flags.dtype)
    settings = {name: getattr(flags, name) for name in ("init", "glue", "max_len", "regression")}
    # From here on, each process has work of its own and reports its own errors.
    os.environ["LOCAL_RANK"] = "0"
    for name, task in tasks.items():
        points, done = grid(name, flags), read_results(flags)
        todo = [title for title in list(points)[machine.rank :: machine.world] if title not in done]
        splits = load_examples(name, task, flags, tokenizer) if todo else None
        for title in todo:
            init = start_of(name, tasks, flags)
            run, model = run_once(title, name, task, splits, points[title], init, machine)
            record(run | dict(settings=settings), model, flags)
    if machine.rank == 0:
        wait_for(tasks, flags)
        runs = list(read_results(flags).values())
        summary = summarize(runs)
        average = statistics.mean(s["score"] for s in summary.values())
        results = dict(summary=summary, average=average, definition=AVERAGE, runs=runs)
        write(Path(flags.out) / "results.json", json.dumps(results, indent=1))
        print_table(summary)
        print(f"average of {len(summary)} tasks: {100 * average:.1f} ({AVERAGE})")
        for name in tasks if flags.predict else []:
            write_predictions(name, tasks[name], flags, tokenizer, machine)


if __name__ == "__main__":
    main()
