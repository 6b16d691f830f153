"""Fine-tune an encoder on GLUE as the paper does (section 3.1, Table 5), or on a task of your own.

    python finetune.py --task RTE --glue GLUE_DIR --init out/tiny/hf --out out/rte
    python finetune.py --task all --glue GLUE_DIR --init out/x/hf --out out/glue --sweep --predict
    python finetune.py --task mine --glue tasks --init roberta-base/ --out out/mine

--init is the hf/ folder of a train.py run, or any Hugging Face RoBERTa folder. --lr, --batch_size,
--epochs and --seed take several values, which make a grid; --sweep is Table 5's grid with five
seeds. For each seed the best run of the grid counts, by the task's score; then the median over the
seeds is taken. A finished run is a line of OUT/TASK/results.jsonl, so the same command resumes
behind the last one; OUT/TASK/hf is the task's best model, OUT/results.json the summary, and
OUT/predictions, with --predict, what the leaderboard wants. Tasks may run side by side, one
process a GPU, with the same --out.

A task of your own is a folder with train.tsv, dev.tsv and, for --predict, test.tsv: tab-separated,
with the columns sentence1, label and, for pairs, sentence2 named in line 1. This file does not
download GLUE or use layer-wise learning rates or ensembles.

Shapes: B examples of a batch | T tokens of the longest, the others padded | C classes, 1 for regression"""

import itertools
import json
import math
import statistics
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import Parser, amount, command, count, load_tokenizer
from model import BOS, EOS, PAD, Classifier, UserError, load_pretrained, save_pretrained, write
from train import DTYPES, Machine, lr_at, make_optimizer, update

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


class Task(NamedTuple):
    """Columns, classes, metrics and files of a task."""

    texts: tuple  # names of the columns of the text, or of the two texts
    label: str
    labels: tuple | None  # names of the classes; None: the labels are numbers
    metrics: tuple
    dev: tuple = ("dev.tsv",)
    tests: tuple = ("test.tsv",)
    answers: tuple = ()  # names of the leaderboard's files, one for each test file; (): the task's
    header: tuple = ()  # names of all columns, where the training and development files have no line 1
    drop_bad_rows: bool = False  # the official training file has malformed rows


PAIR, BINARY, ENTAILMENT = ("sentence1", "sentence2"), ("0", "1"), ("entailment", "not_entailment")
TASKS = {
    "MNLI": Task(PAIR, "gold_label", ("entailment", "neutral", "contradiction"), ("acc",),
                 dev=("dev_matched.tsv", "dev_mismatched.tsv"),
                 tests=("test_matched.tsv", "test_mismatched.tsv", "../diagnostic/diagnostic.tsv"),
                 answers=("MNLI-m", "MNLI-mm", "AX")),
    "CoLA": Task(("sentence",), "label", BINARY, ("mcc",),
                 header=("source", "label", "mark", "sentence")),
    "SST-2": Task(("sentence",), "label", BINARY, ("acc",)),
    "MRPC": Task(("#1 String", "#2 String"), "Quality", BINARY, ("f1", "acc")),
    "STS-B": Task(PAIR, "score", None, ("pearson", "spearman")),
    "QQP": Task(("question1", "question2"), "is_duplicate", BINARY, ("f1", "acc"), drop_bad_rows=True),
    "QNLI": Task(("question", "sentence"), "label", ENTAILMENT, ("acc",)),
    "RTE": Task(PAIR, "label", ENTAILMENT, ("acc",)),
}  # fmt: skip
FROM_MNLI = (
    "RTE",
    "STS-B",
    "MRPC",
)  # these start from MNLI's model, if there is one in --out (Table 5)
GRID = dict(
    seed=range(5), lr=[1e-5, 3e-5, 5e-5, 8e-5], batch_size=[16, 32], epochs=[3, 5, 10]
)  # Table 5
LARGE_GRID = GRID | dict(lr=[5e-5, 8e-5], batch_size=[32], epochs=[3, 5])  # of MNLI, QQP and QNLI
AVERAGE = "GLUE's is over all eight; a task's score is the mean of its metrics, MNLI's of m and mm"


def read_table(path):
    """The rows of a tab-separated file as lists of fields. There is no quoting, and only a newline
    ends a line: sentences contain unbalanced quotes, control characters, U+0085 and U+2028."""
    content = Path(path).read_bytes()
    try:
        lines = content.decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}: line {line} is not UTF-8 text") from e
    return [line.removesuffix("\r").split("\t") for line in lines]


def read_split(path, task, labelled=True):
    """(texts, labels) of a file: tuples of one or two texts; an array of class numbers or scores.
    A malformed row raises UserError, but for the training files that officially have some: those
    are dropped."""
    rows = list(enumerate(read_table(path), 1))
    names = task.header if labelled and task.header else rows.pop(0)[1]
    wanted = [*task.texts, task.label] if labelled else task.texts
    for name in wanted:
        if name not in names:
            raise UserError(f"{path}: line 1 names no column {name}, but {str(names)[:200]}")
    texts, labels = [], []
    for number, row in rows:
        if len(row) != len(names):
            if task.drop_bad_rows and labelled:
                continue
            raise UserError(f"{path}: line {number} has {len(row)} fields, not {len(names)}")
        fields = [row[names.index(name)].strip() for name in wanted]
        if labelled:
            labels.append(read_label(fields.pop(), task, f"{path}: line {number}"))
        texts.append(tuple(fields))
    if not texts:
        raise UserError(f"{path}: contains no examples")
    return texts, np.array(labels)


def read_label(text, task, where):
    """The number of a class, or a score."""
    if task.labels and text in task.labels:
        return task.labels.index(text)
    if not task.labels:
        with suppress(ValueError):
            if math.isfinite(float(text)):
                return float(text)
    expected = f"one of {str(task.labels)[:99]}" if task.labels else "a number"
    raise UserError(f"{where}: label {text!r} is not {expected}; for numbers, see --regression")


def own_task(path, regression):
    """The Task of a training file with columns sentence1, label and, for pairs, sentence2."""
    names, *rows = read_table(path)
    texts = PAIR if "sentence2" in names else PAIR[:1]
    if regression or "label" not in names:
        return Task(texts, "label", None, ("pearson", "spearman"))
    column = names.index("label")
    labels = sorted({row[column].strip() for row in rows if len(row) == len(names)})
    if len(labels) < 2 or not all(labels):
        raise UserError(f"{path}: the labels are {labels}; needs two or more, and no empty one")
    return Task(texts, "label", tuple(labels), ("acc",))


def encode(texts, tokenizer, max_len):
    """Token ids of every example: <s> a </s>, or <s> a </s></s> b </s>, cut to max_len at the end
    of the longer text. Returns (list of lists, how many were cut)."""
    columns = []
    for column in zip(*texts):
        encodings = tokenizer.encode_batch_fast(column, add_special_tokens=False)
        columns.append([encoding.ids for encoding in encodings])
    examples, cut = [], 0
    for a, *rest in zip(*columns):
        room, b = max_len - 2 - 2 * len(rest), rest[0] if rest else []
        cut += len(a) + len(b) > room
        half = (
            room + (len(a) > len(b))
        ) // 2  # the odd token is the longer text's, as in transformers
        a = a[: max(room - len(b), half)]
        b = b[: room - len(a)]
        examples.append([BOS, *a, EOS, EOS, *b, EOS] if rest else [BOS, *a, EOS])
    return examples, cut


# One run


def pad(examples, device):
    """tokens (B, T) and attention_mask (B, T), False at padding."""
    examples = [torch.tensor(x) for x in examples]
    tokens = pad_sequence(examples, batch_first=True, padding_value=PAD).to(device)
    return tokens, tokens != PAD


def batches_of(examples, batch_size, rng=None):
    """Arrays of example numbers. Examples of a batch have similar lengths, so that there is little
    padding. An rng shuffles the batches, and varies the lengths by a tenth so that other examples
    come together."""
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
    """Train a Classifier on lists of ids and an array of labels. point: lr, batch_size, epochs,
    seed."""
    regression, rng = len(model.labels) == 1, np.random.default_rng(point["seed"])
    labels = torch.tensor(labels, dtype=torch.float32 if regression else torch.int64)
    batches = [
        b for _ in range(point["epochs"]) for b in batches_of(examples, point["batch_size"], rng)
    ]
    optimizer = make_optimizer(model, weight_decay=0.1)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype is torch.float16)
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
    """Fine-tune at one point of the grid and evaluate. Returns (the run's line of results.jsonl,
    Classifier). splits: (examples, labels) of the training file and of each development file."""
    train, *devs = splits
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
        collapsed |= bool(np.ptp(p) < 1e-3 < np.ptp(labels))  # one answer for all examples
    score = statistics.mean(metrics.values())
    return dict(point=point, metrics=metrics, score=score, collapsed=collapsed), model


# Many runs


def grid(name, args):
    """The points of a task: one, or Table 5's with --sweep, or those of the given flags."""
    values = dict(seed=[0], lr=[5e-5], batch_size=[32], epochs=[3])
    if args.sweep:
        values = LARGE_GRID if name in ("MNLI", "QQP", "QNLI") else GRID
    values = {flag: getattr(args, flag) or default for flag, default in values.items()}
    return [dict(zip(values, point)) for point in itertools.product(*values.values())]


def fingerprints(encoder, files):
    """What results belong to: the CRC-32 of an encoder's weights, and of the task's files."""
    weights = texts = 0
    for p in encoder.state_dict().values():
        weights = zlib.crc32(p.numpy(), weights)
    for file in files:
        texts = zlib.crc32(file.read_bytes(), texts)
    return dict(encoder=weights, texts=texts)


def read_results(path, settings):
    """The runs of a results.jsonl. Raises UserError if they were made with other settings."""
    try:
        runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if any(run["settings"] != settings for run in runs):
            raise ValueError("its runs had another encoder, other texts, --max_len or --regression")
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: cannot be added to ({e}); choose another --out") from e
    return runs


def run_task(name, task, args, tokenizer, machine):
    """Make the runs of a task that are not yet in its results.jsonl."""
    start, mnli, out = args.init, Path(args.out, "MNLI", "hf"), Path(args.out, name)
    if name in FROM_MNLI and mnli.exists():
        start = mnli
    config, encoder = load_pretrained(start)
    config.dropout = 0.1  # Table 5
    files = [Path(args.glue, name, file) for file in ("train.tsv", *task.dev)]
    settings = fingerprints(encoder, files)
    settings |= dict(max_len=args.max_len, regression=args.regression)
    runs, splits = read_results(out / "results.jsonl", settings), []
    for file in files:
        texts, labels = read_split(file, task)
        examples, cut = encode(texts, tokenizer, args.max_len)
        print(f"{file}: {len(examples):,} examples, {cut:,} of them cut", flush=True)
        splits.append((examples, labels))
    for point in grid(name, args):
        if any(run["point"] == point for run in runs):
            continue
        title = f"{name} " + " ".join(f"{flag} {value}" for flag, value in point.items())
        run, model = run_once(title, task, splits, encoder, config, point, machine)
        if all((x["collapsed"], -x["score"]) > (run["collapsed"], -run["score"]) for x in runs):
            save_pretrained(model, out / "hf", Path(args.init, "tokenizer.json"))
        runs.append(run | dict(start=str(start), settings=settings))
        write(out / "results.jsonl", "".join(json.dumps(x) + "\n" for x in runs).encode())
        print(f"{title}: {percent(run['metrics'])}{' collapsed' * run['collapsed']}", flush=True)


def summarize(runs):
    """Of a task's runs: for each seed the best of the grid by score; over the seeds, the median."""
    runs = sorted(runs, key=lambda run: run["score"])
    best = list({run["point"]["seed"]: run for run in runs}.values())  # the last one of each seed
    scores = [run["score"] for run in best]
    metrics = {m: statistics.median(run["metrics"][m] for run in best) for m in best[0]["metrics"]}
    return dict(
        score=statistics.median(scores), min=min(scores), max=max(scores), metrics=metrics,
        seeds=len(best), runs=len(runs), collapsed=sum(run["collapsed"] for run in runs))  # fmt: skip


def percent(metrics):
    return "  ".join(f"{m} {100 * v:.1f}" for m, v in metrics.items())


def report(out):
    """Write results.json from the results of all tasks in a folder, and print it as Table 3
    does."""
    summary = {}
    for path in sorted(out.glob("*/results.jsonl")):
        summary[path.parent.name] = summarize(
            [json.loads(x) for x in path.read_text().splitlines()]
        )
    for name, s in summary.items():
        score = percent({key: s[key] for key in ("score", "min", "max")})
        numbers = f"seeds {s['seeds']}  runs {s['runs']}  collapsed {s['collapsed']}"
        print(f"{name:<7}{score}  {numbers}  {percent(s['metrics'])}")
    average = statistics.mean(s["score"] for s in summary.values())
    results = dict(summary=summary, average=average, definition=AVERAGE)
    write(out / "results.json", json.dumps(results, indent=1).encode())
    print(f"average of {len(summary)} tasks: {100 * average:.1f} ({AVERAGE})")


def write_predictions(name, task, args, tokenizer, machine):
    """Predict a task's test files with its best model: `index<TAB>prediction`, index from 0, the
    names of the classes or a number (for STS-B from 0 to 5)."""
    model = load_pretrained(Path(args.out, name, "hf"), len(task.labels or ["score"]))[1]
    model.to(machine.device)
    for test, answers in zip(task.tests, task.answers or [name]):
        path, answers = Path(args.glue, name, test), Path(args.out, "predictions", f"{answers}.tsv")
        if not path.exists():
            print(f"{path} is missing, so there is no {answers}")
            continue
        texts, _ = read_split(path, task, labelled=False)
        logits = predict(model, encode(texts, tokenizer, args.max_len)[0], machine)
        if task.labels:
            predictions = [task.labels[i] for i in logits.argmax(1)]
        else:
            scores = logits[:, 0].clip(0, 5) if name == "STS-B" else logits[:, 0]
            predictions = [f"{x:.3f}" for x in scores]
        rows = [f"{i}\t{x}\n" for i, x in enumerate(predictions)]
        write(answers, "".join(["index\tprediction\n", *rows]).encode())
        print(f"{answers}: {len(rows):,} predictions")


# The command


@command
def main(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--task",
        required=True,
        help="a folder in --glue: GLUE's or your own; all: GLUE's that are there",
    )
    add(
        "--glue",
        required=True,
        help="folder with GLUE's folders CoLA, SST-2, ..., or with your own",
    )
    add("--init", required=True, help="Hugging Face RoBERTa folder to start from")
    add("--out", required=True, help="folder for results and models")
    add("--lr", type=amount, nargs="+", help="peak learning rates; None: 5e-5")
    add("--batch_size", type=count, nargs="+", help="examples of a step; None: 32")
    add("--epochs", type=count, nargs="+", help="passes over the training file; None: 3")
    add("--seed", type=int, nargs="+", help="seeds of head, order and dropout; None: 0")
    add("--sweep", action="store_true", help="Table 5's grid and five seeds for what is not given")
    add(
        "--max_len",
        type=count,
        help="tokens of an example; None: 128, or the encoder's fewer positions",
    )
    add(
        "--predict",
        action="store_true",
        help="predict the test files, as the leaderboard wants them",
    )
    add("--regression", action="store_true", help="the labels of your own task are numbers")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="precision of matrix products")
    args = parser.parse_args(argv)
    config, _ = load_pretrained(args.init)
    tokenizer, V = load_tokenizer(Path(args.init, "tokenizer.json"))
    if V > config.vocab_size:
        raise UserError(
            f"{args.init}: tokenizer.json has {V} words, the encoder only {config.vocab_size}"
        )
    args.max_len = args.max_len or min(128, config.n_positions)
    if not 8 <= args.max_len <= config.n_positions:
        raise UserError(
            f"--max_len {args.max_len}: must be from 8 to the encoder's {config.n_positions}"
        )
    machine, found = Machine(dtype=args.dtype), False
    for name in TASKS if args.task == "all" else [args.task]:
        path = Path(args.glue, name, "train.tsv")
        if not path.exists():
            print(f"{path} is missing")
            continue
        task, found = TASKS.get(name) or own_task(path, args.regression), True
        run_task(name, task, args, tokenizer, machine)
        if args.predict:
            write_predictions(name, task, args, tokenizer, machine)
    if not found:
        raise UserError(f"--glue {args.glue}: contains no {args.task}/train.tsv")
    report(Path(args.out))


if __name__ == "__main__":
    main()
