"""Fine-tune an encoder on GLUE as the paper does (section 3.1, Table 5), or on a task of your own.

    python finetune.py --task RTE --glue GLUE_DIR --init out/tiny/hf --out out/rte
    python finetune.py --task all --glue GLUE_DIR --init out/x/hf --out out/glue --sweep --predict
    python finetune.py --task mine --glue tasks --init roberta-base/ --out out/mine

--init is the hf/ folder of a train.py run, or any Hugging Face RoBERTa folder. --lr, --batch_size,
--epochs and --seed take several values, which make a grid; --sweep is Table 5's, with five seeds.
For each seed the best run of the grid counts, by the task's score; then the median over the seeds.
A finished run is a line of OUT/TASK/results.jsonl, so the same command resumes after the last one.
OUT/TASK/hf is the task's best model, OUT/results.json the summary of all tasks ("collapsed" runs
give one answer for all examples), OUT/predictions what the leaderboard wants. Tasks may run side
by side, one process per GPU, but MNLI before the three tasks that start from its model.

A task of your own is a folder with train.tsv, dev.tsv and, for --predict, test.tsv: tab-separated,
with the columns sentence1, label and, for pairs, sentence2 named in line 1. GLUE is not downloaded.

Shapes: B examples of a batch | T tokens of the longest, the others padded | C classes"""

import itertools
import json
import statistics
import zlib
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import command, count, fraction, load_tokenizer, make_parser
from model import PAD, Classifier, UserError
from model import load_pretrained, reading, save_pretrained, write, write_json
from train import Machine, lr_at, make_optimizer, update

# Metrics of predictions p and labels y, arrays; an undefined metric is 0


def accuracy(p, y):
    return float((p == y).mean())


def f1(p, y):
    """Of class 1; the others must be 0."""
    return float(2 * (p * y).sum() / max(1, p.sum() + y.sum()))


def pearson(p, y):
    """For classes 0 and 1, this is Matthews' correlation."""
    p, y = p - p.mean(), y - y.mean()
    norm = np.sqrt((p**2).sum() * (y**2).sum())
    return float((p * y).sum() / norm) if norm > 0 else 0.0


def ranks(x):
    """Ranks from 1; equal values have the average of theirs."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[which]


def spearman(p, y):
    return pearson(ranks(p), ranks(y))


METRICS = dict(acc=accuracy, f1=f1, mcc=pearson, pearson=pearson, spearman=spearman)


# ---- Tasks ----
class Task(NamedTuple):
    """Columns, classes, metrics and files of a task."""

    texts: tuple  # names of the columns of the text, or of the two texts
    label: str
    classes: tuple  # their names, in the order of their numbers; a single one is a regression
    metrics: tuple
    dev: tuple = ("dev.tsv",)
    tests: dict | None = None  # {file for the leaderboard: test file}; None: {task: "test.tsv"}
    header: tuple = ()  # names of all columns, where train and development files do not have them
    drop_bad_rows: bool = False  # the official training file has malformed rows


PAIR, BINARY, NLI = ("sentence1", "sentence2"), ("0", "1"), ("entailment", "not_entailment")
TASKS = {
    "MNLI": Task(PAIR, "gold_label", ("entailment", "neutral", "contradiction"), ("acc",),
                 dev=("dev_matched.tsv", "dev_mismatched.tsv"),
                 tests={"MNLI-m": "test_matched.tsv", "MNLI-mm": "test_mismatched.tsv",
                        "AX": "../diagnostic/diagnostic.tsv"}),
    "CoLA": Task(("sentence",), "label", BINARY, ("mcc",),
                 header=("source", "label", "mark", "sentence")),
    "SST-2": Task(("sentence",), "label", BINARY, ("acc",)),
    "MRPC": Task(("#1 String", "#2 String"), "Quality", BINARY, ("f1", "acc")),
    "STS-B": Task(PAIR, "score", ("score",), ("pearson", "spearman")),
    "QQP": Task(("question1", "question2"), "is_duplicate", BINARY, ("f1", "acc"),
                drop_bad_rows=True),
    "QNLI": Task(("question", "sentence"), "label", NLI, ("acc",)),
    "RTE": Task(PAIR, "label", NLI, ("acc",)),
}  # fmt: skip
FROM_MNLI = ("RTE", "STS-B", "MRPC")  # start from MNLI's model, if --out has one (Table 5)
# Table 5, and what it has for MNLI, QQP and QNLI
GRID = dict(seed=range(5), lr=[1e-5, 3e-5, 5e-5, 8e-5], batch_size=[16, 32], epochs=[3, 5, 10])
LARGE_GRID = GRID | dict(lr=[5e-5, 8e-5], batch_size=[32], epochs=[3, 5])
AVERAGE = "GLUE's is over all eight; a task's score is the mean of its metrics, MNLI's of m and mm"


def read_table(path):
    """The rows of a tab-separated file, lists of fields. There is no quoting, and only "\\n" ends a
    line: sentences contain unbalanced quotes, control characters, U+0085 and U+2028."""
    advice = "it must be a tab-separated file of UTF-8 text"
    with reading(path, advice), open(path, encoding="utf-8-sig", newline="\n") as f:
        rows = [line.rstrip("\r\n").split("\t") for line in f]
    if len(rows) < 2:
        raise UserError(f"{path}: has fewer than two lines")
    return rows


def read_split(path, task, labelled=True):
    """(texts, labels) of a file: tuples of one or two texts; an array of numbers of classes, or of
    scores. A malformed row raises UserError, except in training files that officially have some."""
    rows = list(enumerate(read_table(path), 1))
    names = task.header if labelled and task.header else rows.pop(0)[1]
    wanted = [*task.texts, task.label] if labelled else task.texts
    numbers, texts, labels = {name: i for i, name in enumerate(task.classes)}, [], []
    if missing := set(wanted) - set(names):
        raise UserError(f"{path}: line 1 names no column {missing}, but {str(names)[:200]}")
    for number, row in rows:
        if len(row) != len(names):
            if task.drop_bad_rows and labelled:
                continue
            raise UserError(f"{path}: line {number} has {len(row)} fields, not {len(names)}")
        fields = [row[names.index(name)].strip() for name in wanted]
        texts.append(tuple(fields[: len(task.texts)]))
        if labelled:
            advice = f"label must be one of {task.classes[:9]}, or a number with --regression"
            with reading(f"{path}: line {number}", advice):
                label = fields[-1]  # Fraction refuses nan, which float does not
                labels.append(numbers[label] if len(numbers) > 1 else float(Fraction(label)))
    return texts, np.array(labels)


def own_task(path, regression):
    """The Task of a training file with columns sentence1, label and, for pairs, sentence2."""
    names, *rows = read_table(path)
    texts = PAIR if "sentence2" in names else PAIR[:1]
    if regression:
        return Task(texts, "label", ("score",), ("pearson", "spearman"))
    labels = sorted({dict(zip(names, row)).get("label", "").strip() for row in rows})
    if len(labels) < 2 or not labels[0]:
        raise UserError(f"{path}: needs two or more labels, and no empty one, not {labels[:9]}")
    return Task(texts, "label", tuple(labels), ("acc",))


def encode(texts, tokenizer):
    """Token ids of every example: <s> a </s>, or <s> a </s></s> b </s>, cut at the end of the
    longer text. Each text is cut before that, since the library's cut of a pair takes time and
    memory of the product of both lengths."""
    columns = [tokenizer.encode_batch_fast(x, add_special_tokens=False) for x in zip(*texts)]
    return [tokenizer.post_process(*example).ids for example in zip(*columns)]


def pad(examples, device):
    """tokens (B, T) and attention_mask (B, T), False at padding."""
    examples = [torch.tensor(x) for x in examples]
    tokens = pad_sequence(examples, batch_first=True, padding_value=PAD).to(device)
    return tokens, tokens != PAD


def batches_of(examples, batch_size, rng):
    """Arrays of example numbers, in random order. Those of a batch have similar lengths, so that
    there is little padding; varied by a tenth, so that others come together the next time."""
    lengths = [len(x) * rng.uniform(0.9, 1.1) for x in examples]
    batches = np.split(np.argsort(lengths), range(batch_size, len(lengths), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


@torch.no_grad()
def predict(model, examples, machine):
    """Logits (number of examples, C) as an array, in the order of the examples."""
    model.eval()
    logits = np.empty((len(examples), len(model.labels)))
    batches = batches_of(examples, 64, np.random.default_rng(0))
    for batch in tqdm(batches, "predicting", disable=None, leave=False):
        tokens, mask = pad([examples[i] for i in batch], machine.device)
        with machine.autocast():
            logits[batch] = model(tokens, mask).float().cpu().numpy()
    return logits


def fine_tune(model, examples, labels, point, machine, title):
    """Train a Classifier on lists of ids and an array of labels, at a point of the grid."""
    regression, rng = len(model.labels) == 1, np.random.default_rng(point["seed"])
    labels = torch.tensor(labels, dtype=torch.float32 if regression else torch.int64)
    batches = []
    for _ in range(point["epochs"]):
        batches += batches_of(examples, point["batch_size"], rng)
    optimizer = make_optimizer(model, weight_decay=0.1)
    scaler = machine.scaler()
    model.train()
    for step, batch in enumerate(tqdm(batches, title, disable=None, leave=False)):
        tokens, mask = pad([examples[i] for i in batch], machine.device)
        y = labels[batch].to(machine.device)  # (B,)
        with machine.autocast():
            logits = model(tokens, mask).float()  # (B, C)
        loss = F.mse_loss(logits[:, 0], y) if regression else F.cross_entropy(logits, y)
        scaler.scale(loss).backward()
        update(model, optimizer, scaler, lr_at(step, point["lr"], 0.06, len(batches)))


def run_once(title, task, splits, encoder, config, point, machine):
    """Fine-tune at a point of the grid, and evaluate. Returns (entry of results.jsonl, Classifier).
    splits: (examples, labels) of the training file and of each development file."""
    train, *devs = splits
    torch.manual_seed(point["seed"])  # the head's weights, and dropout
    model = Classifier(config, len(task.classes))
    model.labels = task.classes
    model.encoder.load_state_dict(encoder.state_dict())
    model.to(machine.device)
    fine_tune(model, *train, point, machine, title)
    metrics, collapsed = {}, False
    for (examples, labels), suffix in zip(devs, ("-m", "-mm") if len(devs) > 1 else ("",)):
        logits = np.nan_to_num(predict(model, examples, machine))
        p = logits.argmax(1) if len(task.classes) > 1 else logits[:, 0]
        metrics |= {m + suffix: METRICS[m](p, labels) for m in task.metrics}
        collapsed |= len(set(p)) == 1 < len(set(labels))  # one answer for all examples
    score = statistics.mean(metrics.values())
    return dict(point=point, metrics=metrics, score=score, collapsed=collapsed), model


def grid(name, args):
    """The points of a task: Table 5's with --sweep, else one; given flags come first."""
    values = dict(seed=[0], lr=[5e-5], batch_size=[32], epochs=[3])
    if args.sweep:
        values = LARGE_GRID if name in ("MNLI", "QQP", "QNLI") else GRID
    values = {flag: getattr(args, flag) or default for flag, default in values.items()}
    return [dict(zip(values, point)) for point in itertools.product(*values.values())]


def fingerprint(encoder, files):
    """CRC-32 of an encoder's weights and of a task's files: the results hold for these alone."""
    weights, crc = [p.numpy() for p in encoder.state_dict().values()], 0
    for part in weights + [file.read_bytes() for file in files]:
        crc = zlib.crc32(part, crc)
    return crc


def read_results(path):
    """The entries of a results.jsonl, the lowest score first."""
    with reading(path, "choose another --out"):
        lines = path.read_text().splitlines() if path.exists() else []
        return sorted(map(json.loads, lines), key=lambda run: run["score"])


def run_task(name, task, args, tokenizer, machine):
    """Make the runs of a task that are not yet in its results.jsonl."""
    start, mnli, out = args.init, Path(args.out, "MNLI/hf"), Path(args.out, name)
    if name in FROM_MNLI and (mnli / "config.json").exists():
        if any(run["start"] != start for run in read_results(mnli.parent / "results.jsonl")):
            raise UserError(f"{mnli}: does not start from {start}; choose another --out")
        start = str(mnli)
    config, encoder = load_pretrained(start)
    config.dropout = 0.1  # Table 5
    files, splits = [Path(args.glue, name, file) for file in ("train.tsv", *task.dev)], []
    crc = fingerprint(encoder, [*files, Path(args.init, "tokenizer.json")])
    settings = [crc, args.max_len, args.regression]
    path = out / "results.jsonl"
    runs = read_results(path)
    if any(settings != run.get("settings") for run in runs):
        what = "another encoder, other texts, --max_len or --regression"
        raise UserError(f"{path}: its runs had {what}; choose another --out")
    for texts, labels in [read_split(file, task) for file in files]:
        splits.append((encode(texts, tokenizer), labels))
    for point in grid(name, args):
        if any(run["point"] == point for run in runs):
            continue
        title = f"{name} {point}"
        run, model = run_once(title, task, splits, encoder, config, point, machine)
        if all(run["score"] > other["score"] for other in runs):
            save_pretrained(model, out / "hf", Path(args.init, "tokenizer.json"))
        runs.append(run | dict(start=start, settings=settings))
        write(path, "".join(json.dumps(x) + "\n" for x in runs).encode())
        print(f"{title}: score {100 * run['score']:.1f}{' collapsed' * run['collapsed']}")


def report(out):
    """Summarize the results of all tasks in a folder in results.json, and print it as Table 3 does.
    Of each seed, the best run of the grid counts; over the seeds, the median."""
    summary = {}
    for path in sorted(out.rglob("results.jsonl")):
        runs, name = read_results(path), str(path.parent.relative_to(out))
        best = {run["point"]["seed"]: run for run in runs}  # the last one of each seed
        values = [dict(score=run["score"]) | run["metrics"] for run in best.values()]
        medians = {m: statistics.median(x[m] for x in values) for m in values[0]}
        collapsed = sum(run["collapsed"] for run in runs)
        summary[name] = medians | dict(seeds=len(best), collapsed=collapsed)
        metrics = "  ".join(f"{m} {100 * x:.1f}" for m, x in medians.items())
        print(f"{name:<7}{metrics}  seeds {len(best)}  collapsed {collapsed}")
    average = statistics.mean(medians["score"] for medians in summary.values())
    write_json(out / "results.json", dict(summary=summary, average=average, definition=AVERAGE))
    print(f"average of {len(summary)} tasks: {100 * average:.1f} ({AVERAGE})")


def write_predictions(name, task, args, tokenizer, machine):
    """Predict a task's test files with its best model: `index<TAB>prediction`, index from 0, the
    names of the classes or a number (for STS-B from 0 to 5)."""
    _, model = load_pretrained(Path(args.out, name, "hf"), len(task.classes))
    model.to(machine.device)
    for title, test in (task.tests or {name: "test.tsv"}).items():
        path = Path(args.glue, name, test)
        if not path.exists():
            print(f"{path}: missing, not predicted")
            continue
        texts, _ = read_split(path, task, labelled=False)
        logits = predict(model, encode(texts, tokenizer), machine)
        predictions = [task.classes[i] for i in logits.argmax(1)]
        if len(task.classes) == 1:
            scores = logits[:, 0].clip(0, 5) if name == "STS-B" else logits[:, 0]
            predictions = [f"{x:.3f}" for x in scores]
        rows = ["index\tprediction\n"] + [f"{i}\t{x}\n" for i, x in enumerate(predictions)]
        write(Path(args.out, "predictions", f"{title}.tsv"), "".join(rows).encode())


@command
def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--task", required=True, help="a folder in --glue; all: GLUE's tasks that are there")
    add("--glue", required=True, help="folder with GLUE's folders, or with your own")
    add("--init", required=True, help="Hugging Face RoBERTa folder to start from")
    add("--out", required=True, help="folder for results and models")
    add("--lr", type=fraction, nargs="+", help="peak learning rates; None: 5e-5")
    add("--batch_size", type=count, nargs="+", help="examples of a step; None: 32")
    add("--epochs", type=count, nargs="+", help="passes over the training file; None: 3")
    add("--seed", type=int, nargs="+", help="seeds of head, order and dropout; None: 0")
    add("--sweep", action="store_true", help="Table 5's grid, five seeds, for what is not given")
    add("--max_len", type=count, default=128, help="tokens of an example, if the encoder can")
    add("--predict", action="store_true", help="predict the test files, for the leaderboard")
    add("--regression", action="store_true", help="the labels of your own task are numbers")
    args = parser.parse_args(argv)
    config, _ = load_pretrained(args.init)
    tokenizer, V = load_tokenizer(Path(args.init, "tokenizer.json"))
    if config.vocab_size < V:
        raise UserError(f"{args.init}: tokenizer has {V} words, encoder {config.vocab_size}")
    tokenizer.enable_truncation(min(args.max_len, config.n_positions))
    machine, names = Machine(), [args.task]
    if args.task == "all":
        names = [name for name in TASKS if Path(args.glue, name, "train.tsv").exists()]
    for name in names:
        task = TASKS.get(name) or own_task(Path(args.glue, name, "train.tsv"), args.regression)
        run_task(name, task, args, tokenizer, machine)
        if args.predict:
            write_predictions(name, task, args, tokenizer, machine)
    if not names:
        raise UserError(f"--glue {args.glue}: contains none of {', '.join(TASKS)}")
    report(Path(args.out))


if __name__ == "__main__":
    main()
