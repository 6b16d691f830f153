"""From text to batches: UTF-8 files -> byte-level BPE -> memory-mapped tokens -> rows -> corrupted rows.

    python data.py                             the docstrings of the installed Python -> data/python-docs
    python data.py --input 'corpus/*.txt' --out data/mine    your text; blank lines separate documents
    python data.py --input wiki.txt --doc line --tokenizer roberta/tokenizer.json --out data/wiki
    python data.py --verify data/mine          compare a prepared folder with the checksums in its meta.json

Preparing writes train.bin and val.bin (token ids, one document after another, each followed by </s>),
tokenizer.json and meta.json. meta.json is written last, so a folder that has one is complete. Memory use does
not grow with the text. This file does not clean, deduplicate or detokenize text: the model reads what is in
the files, except that CRLF becomes LF and white space at the end of a document is removed.

Shapes: B rows of a batch | n tokens of a row, <s> and </s> included | n_en kept + n_m masked = n
        k tokens to predict: n_m [MASK]s, n_replaced random words, and the rest, which stay unchanged"""

import argparse
import ast
import functools
import glob
import hashlib
import inspect
import json
import os
import re
import sys
import sysconfig
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
from tqdm import tqdm

DEFAULT_DATA = "data/python-docs"
PIECE = 1 << 16  # characters of a document that are tokenized at once


# Corruption: a row -> a corrupted row


class Corrupted(NamedTuple):
    """A batch as the models take it. All but n_replaced are int64 tensors; n_en + n_m = n."""

    inputs: torch.Tensor  # (B, n) tokens, with [MASK]s and random words in place
    kept: torch.Tensor  # (B, n_en) positions that are not [MASK], ascending
    masked: torch.Tensor  # (B, n_m) positions that are [MASK], ascending
    predict: torch.Tensor  # (B, k) positions to predict: masked, replaced, unchanged, each ascending
    labels: torch.Tensor  # (B, k) the original tokens there
    n_replaced: int  # with n_m it cuts predict into its three kinds

    def rows(self, start, stop, device):
        """Rows start to stop, on a device."""
        tensors = (x[start:stop].to(device, non_blocking=True) for x in self[:-1])
        return Corrupted(*tensors, self.n_replaced)


def counts(n, rate, strategy=(0.8, 0.1, 0.1)):
    """(k, n_m, n_replaced) of a row of n tokens. They are the same for every row, so that every batch has the
    same shape and nothing needs padding. strategy: the shares of [MASK], random and unchanged tokens among
    the k (section 3.3, Table 2c). Raises UserError, a ValueError."""
    if len(strategy) != 3 or not min(strategy) >= 0 or abs(sum(strategy) - 1) > 1e-6:
        raise UserError(f"strategy is {strategy}, must be three shares that sum to 1")
    k = round(rate * (n - 2))
    if not 1 <= k <= n - 2:
        raise UserError(f"mask_rate is {rate}: {k} of {n - 2} tokens would be predicted")
    n_m = round(strategy[0] * k)
    return k, n_m, round((strategy[0] + strategy[1]) * k) - n_m


def corrupt(tokens, rate, strategy=(0.8, 0.1, 0.1), *, vocab, generator=None):
    """Choose k tokens of every row to predict: n_m become [MASK], n_replaced a random word, the rest stay.

    tokens (B, n) int64 -> Corrupted, on the device of tokens. Special tokens are never chosen and never
    drawn. Raises ValueError where a row has fewer than k ordinary tokens (on a CPU; elsewhere the check would
    stall the device, and Data.rows has made sure of it)."""
    k, n_m, n_replaced = counts(tokens.size(1), rate, strategy)
    special = is_special(tokens, vocab)
    if tokens.device.type == "cpu" and int((~special).sum(1).min()) < k:
        raise ValueError(f"a row has fewer than {k} ordinary tokens to predict; lower mask_rate")
    noise = torch.rand(tokens.shape, device=tokens.device, generator=generator)
    order = noise.masked_fill_(special, 2.0).argsort(dim=1)  # (B, n), ordinary tokens first, in random order
    masked, kept = order[:, :n_m].sort().values, order[:, n_m:].sort().values
    replaced = order[:, n_m : n_m + n_replaced].sort().values
    unchanged = order[:, n_m + n_replaced : k].sort().values
    n_words = vocab.size - len(special_ids(vocab))
    words = torch.randint(n_words, replaced.shape, device=tokens.device, generator=generator)
    for i in special_ids(vocab):  # ascending: skip each special id
        words += words >= i
    inputs = tokens.scatter(1, masked, vocab.mask).scatter_(1, replaced, words)
    predict = torch.cat([masked, replaced, unchanged], dim=1)
    return Corrupted(inputs, kept, masked, predict, tokens.gather(1, predict), n_replaced)


def masked_text(text, tokenizer, n_positions):
    """(Corrupted with one row, Tokenizer) of a text with <mask>s, which are to be predicted; tokenizer: the
    path of a tokenizer.json."""
    tokenizer, vocab = load_tokenizer(tokenizer)
    tokenizer.encode_special_tokens = False  # "<mask>" is a token here
    tokens = torch.tensor([tokenizer.encode(text).ids])  # (1, n)
    is_mask = tokens[0] == vocab.mask
    kept, masked = (~is_mask).nonzero().T, is_mask.nonzero().T
    if not masked.numel() or tokens.numel() > n_positions:
        fail(f"--fill: give one <mask> or more in at most {n_positions} tokens")
    return Corrupted(tokens, kept, masked, masked, masked, 0), tokenizer


@dataclass
class Vocab:
    """Size of the vocabulary and ids of its special tokens; the first four are RoBERTa's."""

    size: int
    bos: int = 0  # <s>
    pad: int = 1  # <pad>
    eos: int = 2  # </s>
    unk: int = 3  # <unk>
    mask: int = 50264  # <mask>


def special_ids(vocab):
    return sorted({vocab.bos, vocab.pad, vocab.eos, vocab.unk, vocab.mask})


def is_special(tokens, vocab):
    """Where a tensor or array of ids holds a special token, as bools of its shape."""
    return sum(tokens == i for i in special_ids(vocab)) > 0


# Rows: prepared data -> batches


class Data:
    """A prepared folder. Row i of the part "train" is <s>, the tokens i (n - 2) to (i + 1)(n - 2) of
    train.bin, and </s> (RoBERTa's FULL-SENTENCES). Tokens after the last full row are not used.

    .meta: meta.json; .vocab: a Vocab; .tokens: {part: array of ids}."""

    def __init__(self, directory):
        self.directory, self.meta, self.tokens = Path(directory), read_meta(directory), {}
        self.vocab, dtype = Vocab(**self.meta["vocab"]), np.dtype(self.meta["dtype"])
        for part, count in self.meta["tokens"].items():
            path = self.directory / f"{part}.bin"
            if path.stat().st_size != count * dtype.itemsize:
                fail(f"{path}: does not have the {count:,} tokens that meta.json states; prepare it again")
            self.tokens[part] = np.memmap(path, dtype, "r")

    def n_rows(self, part, n):
        return len(self.tokens[part]) // (n - 2) or fail(f"{self.directory}/{part}.bin: no row of {n} tokens")

    def batch(self, step, batch_size, n, k, seed):
        """The rows of a step, (B, n) int64, a function of (seed, step) alone: row i of the step is row g mod
        N of epoch g div N, where g = step · B + i and every epoch is a permutation of all N rows."""
        count, first = self.n_rows("train", n), step * batch_size
        indices = [permutation(count, seed, g // count)[g % count] for g in range(first, first + batch_size)]
        return torch.from_numpy(self.rows("train", np.array(indices, np.int64), n, k))

    def rows(self, part, indices, n, k):
        """Rows of a part at an array of indices, (B, n) int64. A row of mostly separators, with fewer than k
        ordinary tokens, is replaced by the next row of the file that has enough."""
        count = self.n_rows(part, n)
        tokens = self.tokens[part][: count * (n - 2)].reshape(count, n - 2)
        rows = np.empty((len(indices), n), np.int64)
        rows[:, 0], rows[:, -1] = self.vocab.bos, self.vocab.eos
        for _ in range(count):
            rows[:, 1:-1] = tokens[indices]
            if rows.max() >= self.vocab.size:
                fail(f"{self.directory}/{part}.bin: contains the token {rows.max()}; prepare it again")
            short = is_special(rows, self.vocab).sum(1) > n - k
            if not short.any():
                return rows
            indices = np.where(short, (indices + 1) % count, indices)
        fail(f"{self.directory}/{part}.bin: no row of {n} tokens has {k} to predict; lower mask_rate")

    def frequencies(self):
        """(V,) how often each ordinary word occurs, as shares, in the first 16M tokens of train.bin."""
        count = np.bincount(self.tokens["train"][: 1 << 24], minlength=self.vocab.size) + 1
        count[special_ids(self.vocab)] = 0  # they are never predicted
        return count / count.sum()


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def permutation(n_rows, seed, epoch):
    """The order of an epoch's rows. 94 million rows, all that efficient-large reads, take 0.4 GB."""
    return np.random.default_rng((seed, 1, epoch)).permutation(np.arange(n_rows, dtype=np.uint32))


def seed_of(*parts):
    """A 63-bit seed from a few whole numbers, such as (seed, purpose, step)."""
    return int(np.random.default_rng(parts).integers(2**63))


# Preparation: text files -> tokens


def read_lines(path, bar):
    """Yields the lines of a UTF-8 file; a line longer than PIECE characters comes in several parts."""
    with open(path, encoding="utf-8-sig") as f:
        try:
            while line := f.readline(PIECE):
                if "\0" in line:
                    raise ValueError
                bar.update(len(line))
                yield line
        except ValueError:  # UnicodeDecodeError is one
            fail(f"{path}: not UTF-8 text, near byte {f.buffer.tell():,}; convert it, for example with iconv")


def read_documents(files, doc, title):
    """Yields (text, ends) for the documents of text files; a document longer than PIECE comes in several
    pieces, and `ends` is True for the last of them."""
    size = sum(map(os.path.getsize, files))
    with tqdm(desc=title, total=size, unit="B", unit_scale=True, disable=None) as bar:
        for path in files:
            text, unfinished = "", False
            for line in chain(read_lines(path, bar), [""]):  # "" is the end of the file
                text += line
                # the newline of a line that was cut is no blank line
                blank = not line.strip() and (not unfinished or text.count("\n") > 1)
                ends = not line or dict(line=line[-1:] == "\n", blank=blank, file=False)[doc]
                if ends or len(text) >= PIECE:
                    body = text.rstrip()
                    if body or unfinished:
                        yield body, ends
                        unfinished = not ends
                    text = "" if ends else text[len(body) :]


def write_tokens(pieces, tokenizer, vocab, dtype, out, val_every):
    """Write train.bin and val.bin, with </s> after each document; every val_every-th document, the first one
    included, goes to val.bin. Returns the number of documents."""
    count = 0
    with atomic(out / "train.bin") as train, atomic(out / "val.bin") as val:
        while chunk := list(islice(pieces, 256)):
            encodings = tokenizer.encode_batch_fast([text for text, _ in chunk], add_special_tokens=False)
            for encoding, (_, ends) in zip(encodings, chunk):
                ids = np.array(encoding.ids + [vocab.eos] * ends, dtype)
                (train if count % val_every else val).write(ids.tobytes())
                count += ends
    return count


def prepare(files, out, doc="blank", tokenizer=None, vocab_size=16384, val_every=100):
    """Tokenize text files into the folder `out`; the top of this file says what is written there.

    files: paths; doc: what a document is, "blank" (lines up to a blank one), "line" or "file"; tokenizer: a
    tokenizer.json, or None to train one with vocab_size tokens; val_every: see write_tokens."""
    out = Path(out)
    with lock(out):
        if (out / "meta.json").exists():
            fail(f"{out}: already prepared; use it, choose another --out, or delete it to start again")
        if tokenizer is None:
            step = 1 + sum(map(os.path.getsize, files)) // (200 << 20)  # train on 200 MB of it
            pieces = islice(read_documents(files, doc, "reading"), 0, None, step)
            tokenizer = train_bpe((text for text, _ in pieces), vocab_size, out / "tokenizer.json")
        tokenizer, vocab = load_tokenizer(tokenizer)
        write(out / "tokenizer.json", tokenizer.to_str(pretty=True))
        dtype = np.dtype(np.uint16 if vocab.size <= 1 << 16 else np.uint32)
        count = write_tokens(
            read_documents(files, doc, "tokenizing"), tokenizer, vocab, dtype, out, val_every
        )
        tokens = {part: os.path.getsize(out / f"{part}.bin") // dtype.itemsize for part in ("train", "val")}
        if not all(tokens.values()):
            fail(f"{files[0]}: {count} document(s), too few for training and validation; see --doc")
        meta = dict(vocab=asdict(vocab), dtype=dtype.name, tokens=tokens)
        meta["sha256"] = {name: sha256_of(out / name) for name in ("train.bin", "val.bin", "tokenizer.json")}
        write(out / "meta.json", json.dumps(meta, indent=1))
    tokens = f"{tokens['train']:,} tokens for training and {tokens['val']:,} for validation"
    print(f"{out}: {count:,} documents, {vocab.size:,} words, {tokens}")


def sha256_of(path):
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def read_meta(directory):
    path = Path(directory) / "meta.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        fail(f"{path}: {e}; prepare the data first: python data.py --input FILES --out {directory}")


def verify(directory):
    """Compare every file of a prepared folder with its checksum in meta.json."""
    for name, digest in read_meta(directory)["sha256"].items():
        path = Path(directory) / name
        if sha256_of(path) != digest:
            fail(f"{path}: not what data.py wrote; delete {directory} and prepare the data again")
        print(f"{path}: unchanged")


def load_tokenizer(path):
    """(tokenizers.Tokenizer, Vocab) of a tokenizer.json with RoBERTa's special tokens, which texts cannot
    contain: there, "<s>" is plain text."""
    from tokenizers import Tokenizer, processors

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:
        fail(f"{path}: not a readable tokenizer.json ({e})")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    ids = [tokenizer.token_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]
    if ids[:4] != [0, 1, 2, 3] or ids[4] is None:
        fail(f"{path}: needs <s> <pad> </s> <unk> as tokens 0 to 3, as RoBERTa has, and a <mask>; has {ids}")
    return tokenizer, Vocab(tokenizer.get_vocab_size(), *ids)


def train_bpe(texts, vocab_size, path):
    """Train a byte-level BPE with RoBERTa's special tokens (ids 0-3, <mask> last) and write it to `path`."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    first = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(texts, vocab_size - 1, special_tokens=first)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    write(path, tokenizer.to_str())
    return path


def write_python_docs(path):
    """Write the docstrings and other long strings in Python's library, numpy and torch: about 10 MB."""
    texts = {}  # a dict keeps the order and drops repetitions
    for root in (sysconfig.get_paths()["stdlib"], *np.__path__, *torch.__path__):
        for file in tqdm(sorted(Path(root).rglob("*.py")), f"reading {root}", unit="file", disable=None):
            if "site-packages" in file.relative_to(root).parts:
                continue
            with suppress(SyntaxError, ValueError):
                for node in ast.walk(ast.parse(file.read_bytes())):
                    text = getattr(node, "value", None)
                    if isinstance(text, str) and len(text.split()) >= 40:
                        texts["\n".join(filter(str.strip, inspect.cleandoc(text).splitlines()))] = True
    write(path, "\n\n".join(texts).encode("utf-8", "ignore").decode())


# Plumbing that all scripts share


class UserError(ValueError):
    """Something that the user can fix, in one line; `command` prints it without a traceback."""


def fail(message):
    """One line on stderr (under torchrun, from each node's first process only) and exit status 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def command(main):
    """Decorator of a script's main: errors that the user can fix are one line on stderr."""

    def run(argv=None):
        try:
            main(argv)
        except UserError as e:
            fail(e)
        except OSError as e:
            fail(f"{e.filename}: {e.strerror}" if e.filename else e)
        except KeyboardInterrupt:
            sys.exit(130)

    return run


@contextmanager
def atomic(path, mode="wb"):
    """Open `path` for writing; until everything is on disk it has a temporary name. Raises OSError."""
    tmp = Path(f"{path}.tmp")
    try:
        tmp.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        raise OSError(f"{path}: cannot be written ({str(e).splitlines()[0]}); is the disk full?") from e
    finally:
        tmp.unlink(missing_ok=True)


def write(path, text):
    """Write a text file, whole or not at all."""
    with atomic(path, "w") as f:
        f.write(text)


@contextmanager
def lock(directory, wait=False):
    """Let one process at a time work in a folder. The lock ends with the process. Windows has none."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    with open(Path(directory) / ".lock", "w") as f:
        try:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except ImportError:
            pass
        except BlockingIOError:
            fail(f"{directory}: another process is working there; wait for it, or choose another --out")
        yield


def parse_flags(config_class, argv, description, presets=lambda given: {}):
    """A dataclass from the command line: every field with a comment is a flag, and the comment is its help.
    Numbers must be at least 0, or at least 1 if they are whole and their default is not 0. presets: a
    function from the given flags to other defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)  # fmt: skip
    parser.error = fail
    sources = "".join(map(inspect.getsource, reversed(config_class.__mro__[:-1])))
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", sources, re.M))
    for f in fields(config_class):
        kind = (get_args(f.type) or [f.type])[0]  # int of list[int], "a" of Literal["a", "b"]

        def number(text, kind=kind, least=int(kind is int and f.default != 0)):
            if not least <= kind(text) < float("inf"):
                raise argparse.ArgumentTypeError(f"{text} is not a number of at least {least}")
            return kind(text)

        how = dict(required=f.default is MISSING, type=str if kind is str else number)
        if get_origin(f.type) is list:
            how["nargs"] = "+"
        if kind is bool:
            how = dict(action="store_true")
        elif isinstance(kind, str):
            how = dict(choices=get_args(f.type))
        if f.name in comments:
            default = "" if f.default in (None, "", MISSING) else f" (default: {f.default})"
            parser.add_argument(f"--{f.name}", help=comments[f.name] + default, **how)
    given = vars(parser.parse_args(argv))
    return config_class(**(presets(given) | given))


# The command


@dataclass
class Flags:
    input: list[str] = None  # UTF-8 text files, or globs (default: docstrings of the installed Python)
    doc: Literal["blank", "line", "file"] = "blank"  # a document: lines up to a blank one, a line, a file
    tokenizer: str = None  # a tokenizer.json to use, such as RoBERTa's (default: train one)
    vocab_size: int = None  # size of the BPE, if one is trained (default: 16384; docstrings: 2048)
    val_every: int = 100  # every N-th document is kept for validation
    out: str = None  # folder to write (default for the docstrings: data/python-docs)
    verify: str = None  # a prepared folder to compare with its checksums; nothing else is done


@command
def main(argv):
    flags = parse_flags(Flags, argv, __doc__)
    if flags.verify:
        return verify(flags.verify)
    out, files = flags.out or DEFAULT_DATA, []
    if flags.input and not flags.out:
        fail("--out: missing; name the folder to write")
    for pattern in flags.input or []:
        found = [f for f in sorted(glob.glob(pattern, recursive=True)) or [pattern] if os.path.isfile(f)]
        files += found or fail(f"--input {pattern}: no such file; name files, or a glob of them in quotes")
    if not files:
        files = [Path(out) / "corpus.txt"]
        write_python_docs(files[0])
    vocab_size = flags.vocab_size or (16384 if flags.input else 2048)
    prepare(files, out, flags.doc, flags.tokenizer, vocab_size, flags.val_every)


if __name__ == "__main__":
    main()
