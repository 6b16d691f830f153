"""Text to rows of tokens: UTF-8 files -> BPE -> memory-mapped tokens -> batches of rows.

    python data.py                      the docstrings of the installed Python -> data/python-docs
    python data.py --input 'corpus/*.txt' --out data/mine      a blank line ends a document
    python data.py --input wiki.txt --doc line --tokenizer roberta/tokenizer.json --out data/wiki

This writes train.bin and val.bin (the tokens of one document after another, each followed by </s>;
one document of a hundred is for validation), tokenizer.json and, last, meta.json, so that a folder
that has one is complete. Memory does not grow with the text. Blank lines and white space at the
ends of lines are dropped; apart from that nothing is cleaned, deduplicated or detokenized.

Shapes: B rows of a batch | n tokens of a row, <s> and </s> included"""

import argparse
import ast
import functools
import glob
import inspect
import json
import os
import sys
import sysconfig
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, processors
from tqdm import tqdm

from model import BOS, EOS, PAD, UNK, UserError, atomic, reading, write, write_json


class Data:
    """A prepared folder: .meta of meta.json, .vocab_size, .mask_id, .tokens["train"] and ["val"].

    Row i is <s>, the tokens i (n - 2) to (i + 1)(n - 2), and </s> (RoBERTa's FULL-SENTENCES). Those
    after the last full row are not used."""

    def __init__(self, directory):
        self.directory, self.tokens = Path(directory), {}
        with reading(directory, "python data.py --input FILES --out DIRECTORY prepares a text"):
            self.meta = json.loads((self.directory / "meta.json").read_bytes())
            self.vocab_size, self.mask_id = self.meta["vocab_size"], self.meta["mask_id"]
            for split, length in self.meta["tokens"].items():
                path = self.directory / f"{split}.bin"
                self.tokens[split] = np.memmap(path, self.meta["dtype"], "r", shape=(length,))

    def n_rows(self, split, n):
        if not 0 < n - 2 <= len(self.tokens[split]):
            raise UserError(f"{self.directory}/{split}.bin: has no row of {n} tokens")
        return len(self.tokens[split]) // (n - 2)

    def rows(self, split, indices, n):
        """The rows of a sequence of indices, (B, n) int64."""
        N, rows = self.n_rows(split, n), np.empty((len(indices), n), np.int64)
        rows[:, 0], rows[:, -1] = BOS, EOS
        rows[:, 1:-1] = self.tokens[split][: N * (n - 2)].reshape(N, n - 2)[indices]
        return torch.from_numpy(rows)

    def batch(self, step, batch_size, n, seed):
        """The rows of a training step, (B, n) int64, a function of (seed, step) alone. Row number
        g = step * B + i of a run is row g mod N of epoch g div N, a permutation of all N rows."""
        N, numbers = self.n_rows("train", n), range(step * batch_size, (step + 1) * batch_size)
        return self.rows("train", [permutation(N, seed, g // N)[g % N] for g in numbers], n)


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def permutation(n_rows, seed, epoch):
    """The order of an epoch's rows: 0.2 GB for the 30 million of a corpus of 16 GB."""
    return np.random.default_rng((seed, 1, epoch)).permutation(n_rows)


def seed_of(*parts):
    """A 63-bit seed from whole numbers such as (seed, purpose, step)."""
    return int(np.random.default_rng(parts).integers(2**63))


# ---- Preparation: text -> tokens ----
LIMIT = 1 << 14  # characters; a longer line is tokenized in parts
END = ""  # stands between documents
VAL_EVERY = 100  # one of so many documents is for validation


def read_texts(files, doc, title):
    """Yields the lines of text files, newlines being before lines, and END after a document. No
    token crosses the end of a line, so the tokens of the lines are those of the document. Only in a
    line longer than LIMIT, which comes in parts, may a word be cut."""
    size = sum(map(os.path.getsize, files))
    bar = tqdm(desc=title, total=size, unit="B", unit_scale=True, disable=None)
    for path in files:
        started = within = False  # a document has started; the last part ended within its line
        f = open(path, encoding="utf-8-sig", newline="\n")
        with f, reading(path, "convert it to UTF-8, for example by iconv"):
            while part := f.readline(LIMIT):
                bar.update(len(part.encode()))
                text = part.rstrip() if part.endswith("\n") else part
                blank = not within and not text.strip()
                if text and not blank:
                    yield "\n" + text if started and not within else text
                    started = True
                within = not part.endswith("\n")
                if started and (doc == "blank" and blank or doc == "line" and not within):
                    yield END
                    started = False
        if started:
            yield END
    bar.close()


def write_tokens(texts, tokenizer, dtype, out):
    """Write train.bin and val.bin (every VAL_EVERY-th document), and return their meta.json."""
    documents = 0
    with atomic(out / "train.bin") as train, atomic(out / "val.bin") as val:
        while chunk := list(islice(texts, 256)):
            encodings = tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
            for text, encoding in zip(chunk, encodings):
                file = train if documents % VAL_EVERY else val
                file.write(np.array([EOS] if text == END else encoding.ids, dtype))
                documents += text == END
        tokens = {"train": train.tell() // dtype.itemsize, "val": val.tell() // dtype.itemsize}
    return dict(documents=documents, tokens=tokens)


def prepare(files, out, doc="blank", tokenizer=None, vocab_size=16384):
    """Tokenize text files into the folder `out`; doc: "blank" (lines up to a blank one), "line" or
    "file"; tokenizer: a tokenizer.json, None: train one with vocab_size words. Raises UserError."""
    out = Path(out)
    if (out / "meta.json").exists():
        raise UserError(f"{out}: already prepared; use it, choose another --out, or delete it")
    if tokenizer is None:
        stride = 1 + sum(map(os.path.getsize, files)) // (200 << 20)  # learn from some 200 MB
        texts = islice(read_texts(files, doc, "reading"), 0, None, stride)
        tokenizer = train_bpe(texts, vocab_size, out / "tokenizer.json")
    tokenizer, V = load_tokenizer(tokenizer)
    write(out / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    dtype = np.dtype(np.uint16 if V <= 1 << 16 else np.uint32)
    texts = read_texts(files, doc, "tokenizing")
    meta = write_tokens(texts, tokenizer, dtype, out)
    train, val = meta["tokens"]["train"], meta["tokens"]["val"]
    size = f"{meta['documents']:,} documents: {train:,} tokens for training, {val:,} for validation"
    if not train or not val or val > 10 / VAL_EVERY * train:
        raise UserError(f"{files[0]}: {size}; more and shorter documents are needed, see --doc")
    meta |= dict(vocab_size=V, mask_id=tokenizer.token_to_id("<mask>"), dtype=dtype.name)
    write_json(out / "meta.json", meta)
    print(f"{out}: {V:,} words, {size}")


def write_python_docs(path):
    """Write the long strings, mostly docstrings, in Python's library, numpy and torch: 11 MB."""
    texts = {}  # a dict keeps the order and drops repetitions
    for root in (sysconfig.get_paths()["stdlib"], *np.__path__, *torch.__path__):
        files = sorted(Path(root).rglob("*.py"))
        for file in tqdm(files, f"reading {root}", unit="file", disable=None):
            if "site-packages" in file.relative_to(root).parts:
                continue
            with suppress(SyntaxError, ValueError):
                for node in ast.walk(ast.parse(file.read_bytes())):
                    text = getattr(node, "value", None)
                    if isinstance(text, str) and len(text.split()) >= 40:
                        lines = inspect.cleandoc(text).splitlines()
                        texts["\n".join(filter(str.strip, lines))] = True
    write(path, "\n\n".join(texts).encode("utf-8", "ignore"))


# ---- Tokenizers ----
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def train_bpe(texts, vocab_size, path):
    """Train a byte-level BPE as RoBERTa's: special tokens 0 to 3, <mask> last. Returns its path."""
    if vocab_size < 256 + len(SPECIAL):
        raise UserError(f"--vocab_size {vocab_size}: must be at least 261, for all bytes")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size - 1, special_tokens=list(SPECIAL[:4]))
    tokenizer.add_special_tokens([SPECIAL[4]])
    write(path, tokenizer.to_str().encode())
    return path


def load_tokenizer(path):
    """(tokenizers.Tokenizer, V) of a tokenizer.json with RoBERTa's special tokens; V is the largest
    id + 1. "<s>" or "<mask>" in a text is encoded as plain text. Raises UserError."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers has no other type
        raise UserError(f"{path}: not a readable tokenizer.json ({e})") from e
    ids = [tokenizer.token_to_id(token) for token in SPECIAL]
    if ids[:4] != [BOS, PAD, EOS, UNK] or ids[4] is None:
        raise UserError(f"{path}: {', '.join(SPECIAL)} are {ids}, must be 0, 1, 2, 3 and any other")
    tokenizer.add_special_tokens(
        [AddedToken(x, lstrip=x == "<mask>", special=True) for x in SPECIAL]
    )
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", EOS), ("<s>", BOS))
    text = "<s>\xe9\u4f60\U0001f600"  # decoding drops special tokens, <unk> too
    if text not in tokenizer.decode(tokenizer.encode(text).ids):
        raise UserError(f"{path}: loses some characters, or takes '<s>' in a text for a token")
    return tokenizer, max(tokenizer.get_vocab().values()) + 1


def command(main):
    """Decorator of a script's main: what the user can put right is one line on stderr, status 2."""

    def run(argv=None):
        with suppress(AttributeError):  # a notebook's stdout has no such method
            # Show lines at once, in files too, and no error where a terminal lacks a character.
            sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        try:
            main(sys.argv[1:] if argv is None else argv)
        except (UserError, OSError) as e:
            print("error:", " ".join(str(e).split()), file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return run


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the description as it is, and every flag's default."""


def make_parser(description):
    """An argparse without usage, so that its errors are one line too, and without abbreviations."""
    return argparse.ArgumentParser(
        description=description, formatter_class=HelpFormatter, usage=argparse.SUPPRESS,
        allow_abbrev=False)  # fmt: skip


def count(text):
    """A flag's whole number of at least 1."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def fraction(text):
    """A flag's number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise ValueError(text)
    return float(text)


@command
def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", default=[], help="UTF-8 files or globs; none: Python's docstrings")
    add("--doc", choices=("blank", "line", "file"), default="blank", help="what ends a document")
    add("--tokenizer", help="a tokenizer.json to use, such as RoBERTa's; None: train a BPE")
    add("--vocab_size", type=count, help="words of that BPE; None: 16384, for docstrings 2048")
    add("--out", help="folder to write; for the docstrings, None is data/python-docs")
    args = parser.parse_args(argv)
    if args.input and not args.out:
        raise UserError("--out: missing; name the folder to write")
    out, files = Path(args.out or "data/python-docs"), []
    for pattern in args.input:
        files += sorted(glob.glob(pattern, recursive=True)) or [pattern]
    if not files:
        files = [out / "corpus.txt"]
        write_python_docs(files[0])
    vocab_size = args.vocab_size or (16384 if args.input else 2048)
    prepare(files, out, args.doc, args.tokenizer, vocab_size)


if __name__ == "__main__":
    main()
