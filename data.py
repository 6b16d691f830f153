"""From text to batches: UTF-8 files -> byte-level BPE -> memory-mapped tokens -> corrupted rows.

    python data.py                             the installed Python's docstrings -> data/python-docs
    python data.py --input 'corpus/*.txt' --out data/mine    your text; blank lines part documents
    python data.py --input wiki.txt --doc line --tokenizer roberta/tokenizer.json --out data/wiki
    python data.py --verify data/mine           read it all again and compare with its hashes

Preparing leaves train.bin, val.bin (token ids, documents one after another, each closed by </s>),
tokenizer.json and meta.json; meta.json is written last, so a folder that has one is complete.
Memory does not grow with the text. It does not clean, deduplicate or detokenise: what stands in
the files is what the model reads, but CRLF becomes LF and space at a document's end goes.

Shapes: B rows of a batch | n tokens of a row, <s> and </s> included | n_en kept + n_m masked = n
        k tokens to predict, k = n_m [MASK]s + n_replaced random ones + the rest, unchanged
"""

import argparse
import ast
import codecs
import glob
import hashlib
import inspect
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

DEFAULT_DATA = "data/python-docs"
PIECE = 1 << 20  # bytes of one document that are encoded at once
CHUNK = 1 << 22  # bytes of documents that go through the tokenizer together
BPE_SAMPLE = 200 << 20  # bytes of text, documents at random, that a new BPE is trained on


def fail(message, everywhere=False):
    """One line on stderr (under torchrun, of a node's first process alone, unless what is wrong is
    this process's own), exit status 2."""
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextmanager
def atomic(path, mode="wb"):
    """Open `path` for writing under a temporary name; it gets its own when all is on disk, or
    never."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException as e:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        if not isinstance(e, OSError):
            raise
        reason = e.strerror or str(e)
        fail(f"{path}: cannot be written ({reason}); free some space or choose another folder")


@contextmanager
def lock(directory, wait=False, name=".lock"):
    """One process at a time in a folder, by a lock that dies with its process, so that none is ever
    stale. Where the platform has no flock (Windows), nothing is locked."""
    new = not Path(directory).exists()
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        file = open(Path(directory) / name, "w")
    except OSError as e:
        fail(f"{directory}: cannot be written ({e.strerror}); choose another folder")
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except ImportError:
            pass
        except OSError:
            fail(f"{directory}: another process writes there; wait for it, or take another folder")
        try:
            yield
        finally:
            with suppress(OSError):
                if new and os.listdir(directory) == [name]:  # refused: leave nothing behind
                    shutil.rmtree(directory)


def command(main, interrupted):
    """Run a script's main. Ctrl-C and a reader that goes away (| head) end it without a
    traceback."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        sys.exit(141)


def seed_of(*parts):
    """A 63-bit seed from a few whole numbers, as (seed, step, micro-batch)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def shuffled(i, n, key):
    """Elements i (an array) of a pseudo-random permutation of range(n), without ever holding the
    permutation: n may be billions. A Feistel network permutes the next power of four; what falls
    outside range(n) goes through it again until it falls inside."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(key).generate_state(6, np.uint64)

    def network(x):
        left, right = x >> half, x & low
        for key in keys:
            z = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps, as a hash should
            z = (z ^ (z >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ (z >> np.uint64(32)) & low
        return left << half | right

    x = network(np.asarray(i, dtype=np.uint64))
    while (outside := x >= n).any():
        x[outside] = network(x[outside])
    return x.astype(np.int64)


# Vocabulary and tokenizer


@dataclass
class Vocab:
    """Size and special ids; RoBERTa's order for the first four."""

    size: int
    bos: int = 0  # <s>
    pad: int = 1  # <pad>
    eos: int = 2  # </s>
    unk: int = 3  # <unk>
    mask: int = 50264  # <mask>


SPECIALS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}


def special_ids(vocab):
    return sorted({vocab.bos, vocab.pad, vocab.eos, vocab.unk, vocab.mask})


def is_special(tokens, vocab):
    """Where a tensor or array of ids holds <s>, <pad>, </s>, <unk> or <mask>."""
    first, *others = special_ids(vocab)
    found = tokens == first
    for i in others:
        found = found | (tokens == i)
    return found


def load_tokenizer(path):
    """(tokenizers.Tokenizer, Vocab) of a tokenizer.json that has RoBERTa's specials; "<s>" in a
    text is text."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        fail("turning text into tokens needs the package tokenizers: pip install tokenizers")
    if not Path(path).is_file():
        fail(f"{path}: no such file; a tokenizer.json is needed")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:
        fail(f"{path}: not a tokenizer.json ({e})")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    ids = {name: tokenizer.token_to_id(token) for name, token in SPECIALS.items()}
    if [ids["bos"], ids["pad"], ids["eos"], ids["unk"]] != [0, 1, 2, 3] or ids["mask"] is None:
        fail(
            f"{path}: needs RoBERTa's specials, <s> <pad> </s> <unk> as ids 0-3 and a <mask>; has "
            f"{ids}"
        )
    return tokenizer, Vocab(tokenizer.get_vocab_size(), **ids)


def train_bpe(texts, vocab_size, path):
    """A byte-level BPE with RoBERTa's specials (ids 0-3, <mask> last), written to `path`."""
    try:
        from tokenizers import (
            AddedToken,
            Tokenizer,
            decoders,
            models,
            pre_tokenizers,
            processors,
            trainers,
        )
    except ImportError:
        fail("training a BPE needs the package tokenizers: pip install tokenizers")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # and <mask>
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    with atomic(path, "w") as f:
        f.write(tokenizer.to_str(pretty=True))


# The default corpus: text that every installation carries


def long_strings(path):
    """The docstrings and other string constants of 40 words and more in a .py file."""
    try:
        nodes = ast.walk(ast.parse(Path(path).read_bytes()))
        texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []
    texts = [t.encode("utf-8", "ignore").decode() for t in texts if len(t.split()) >= 40]
    return ["\n".join(filter(str.strip, inspect.cleandoc(t).splitlines())) for t in texts]


def write_python_docs(path):
    """The documentation inside the Python standard library, numpy and torch as a text file, a
    string a document: about 11 MB of English prose, the same for the same versions of the
    three."""
    roots = [sysconfig.get_paths()["stdlib"], *np.__path__, *torch.__path__]
    skip = ("site-packages", "dist-packages")
    files = [
        f
        for root in map(Path, roots)
        for f in sorted(root.rglob("*.py"))
        if not any(part in skip for part in f.relative_to(root).parts)
    ]
    seen = {}
    with ProcessPoolExecutor() as pool:
        found = pool.map(long_strings, files, chunksize=32)
        for texts in tqdm(found, "reading docstrings", len(files), unit="file", disable=None):
            seen.update(dict.fromkeys(texts))
    with atomic(path, "w") as f:
        f.write("\n\n".join(seen) + "\n")


# Text files -> documents


def index_documents(files, doc, out):
    """Write (file, first byte, last byte + 1) of every document to the binary file `out` and
    return how many there are. Reads each text once, a line at a time, and checks on the way that
    it is UTF-8."""
    count, total = 0, sum(os.path.getsize(f) for f in files)
    with tqdm(
        total=total, desc="finding documents", unit="B", unit_scale=True, disable=None
    ) as bar:
        for i, path in enumerate(files):
            spans, start, line_number = [], None, 1
            decoder = codecs.getincrementaldecoder("utf-8")()
            ended = True  # a line longer than PIECE comes in several reads
            with open_file(path) as f:
                if f.read(3) != codecs.BOM_UTF8:
                    f.seek(0)
                at = f.tell()
                while line := f.readline(PIECE):
                    try:
                        decoder.decode(line)
                    except UnicodeDecodeError:
                        fail(
                            f"{path}: line {line_number} is not UTF-8; convert the file, as with "
                            "iconv"
                        )
                    if b"\0" in line:
                        fail(f"{path}: line {line_number} holds a zero byte; text files only")
                    blank, ended = ended and not line.strip(), line.endswith(b"\n")
                    if start is None and not blank:
                        start = at
                    at += len(line)
                    if start is not None and (blank if doc == "blank" else ended and doc == "line"):
                        spans.append((i, start, at - len(line) if blank else at))
                        start = None
                    line_number += ended
                    bar.update(len(line))
                    if len(spans) == 4096:
                        count += len(spans)
                        np.array(spans, np.int64).tofile(out)
                        spans = []
            if decoder.getstate()[0]:
                fail(f"{path}: line {line_number} ends within a character; the file is cut off")
            if start is not None:
                spans.append((i, start, at))
            count += len(spans)
            np.array(spans, np.int64).tofile(out)
    out.flush()
    return count


def open_file(path):
    try:
        return open(path, "rb")
    except OSError as e:
        fail(f"{path}: cannot be read ({e.strerror})")


def document_pieces(file, start, end):
    """Yields (text, is it the last) for a document's bytes start to end, in pieces of about a
    megabyte that end with a line where there is one."""
    decoder, held = codecs.getincrementaldecoder("utf-8")("replace"), ""
    file.seek(start)
    while start < end and (block := file.read(min(PIECE, end - start))):
        start += len(block)
        text, last = held + decoder.decode(block, start >= end), start >= end
        cut = len(text) if last else text.rfind("\n") + 1 or len(text) - text.endswith("\r")
        text, held = text[:cut].replace("\r\n", "\n"), text[cut:]
        yield (text.rstrip(), True) if last else (text, False)


def read_documents(files, index, order, seed):
    """Yields (text, does the document end with it) for the documents at range `order` of a
    shuffle by seed, in lists of about CHUNK bytes."""
    handles, pieces, size = {}, [], 0
    for i in range(order.start, order.stop, 4096):
        block = shuffled(np.arange(i, min(i + 4096, order.stop)), len(index), (seed, 0))
        for file, start, end in index[block].tolist():
            if file not in handles:
                if len(handles) == 64:  # open files; a corpus may lie in thousands
                    handles.pop(next(iter(handles))).close()
                handles[file] = open_file(files[file])
            for piece in document_pieces(handles[file], start, end):
                pieces.append(piece)
                size += len(piece[0])
                if size >= CHUNK:
                    yield pieces
                    pieces, size = [], 0
    yield pieces


# Documents -> train.bin, val.bin


def encoded(documents, tokenizer):
    """Yields read_documents' lists with their encodings, the next being made while these are
    used."""

    def encode(pieces):
        texts = [text for text, _ in pieces]
        return zip(tokenizer.encode_batch_fast(texts, add_special_tokens=False), pieces)

    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for pieces in chain(documents, [None]):
            done, ahead = ahead, pieces and pool.submit(encode, pieces)
            if done:
                yield done.result()


def tokenize(documents, tokenizer, vocab, dtype, path, total):
    """Write read_documents' documents to `path`, </s> behind each; returns (tokens, SHA-256 of
    the file)."""
    count, digest = 0, hashlib.sha256()
    bar = tqdm(total=total, desc=f"writing {path.name}", unit=" documents", disable=None)
    with atomic(path) as f, bar:
        for pieces in encoded(documents, tokenizer):
            for encoding, (_, last) in pieces:
                ids = np.array(encoding.ids + [vocab.eos] * last, dtype)
                f.write(ids)
                digest.update(ids)
                count += len(ids)
                bar.update(last)
    return count, digest.hexdigest()


def prepare(files, out, doc="blank", tokenizer=None, vocab_size=16384, val=0.01, seed=0):
    """Tokenise text files into the folder `out`; the head of this file says what it leaves there.

    files: paths; doc: what a document is, "blank", "line" or "file"; tokenizer: a tokenizer.json,
    None: train one of vocab_size; val: the share of documents kept for validation, one at
    least."""
    out = Path(out)
    asked = dict(doc=doc, tokenizer=tokenizer and sha256_of(tokenizer), vocab_size=vocab_size)
    reading = tqdm(files, "hashing texts", unit="file", disable=None)
    asked |= dict(val=val, seed=seed, files=[[Path(f).name, sha256_of(f)] for f in reading])
    with lock(out), tempfile.TemporaryFile(dir=out) as f:
        if (out / "meta.json").exists():
            if read_meta(out)["asked"] != asked:
                fail(f"{out}: holds data of other files or options; choose another --out")
            print(f"{out}: already prepared from these files")
            return
        n_docs = index_documents(files, doc, f)
        if n_docs < 2:
            fail(f"{files[0]}: {n_docs} document(s), 2 are needed, one to validate on; see --doc")
        index = np.memmap(f, np.int64, "r", shape=(n_docs, 3))
        n_val = min(max(1, round(val * n_docs)), n_docs - 1)
        if tokenizer:
            with atomic(out / "tokenizer.json") as g:
                g.write(Path(tokenizer).read_bytes())
        else:
            print(f"training a byte-level BPE of {vocab_size} tokens", flush=True)
            texts = bpe_sample(files, index, range(n_val, n_docs), seed)
            train_bpe(texts, vocab_size, out / "tokenizer.json")
        tokenizer, vocab = load_tokenizer(out / "tokenizer.json")
        dtype = np.dtype(np.uint16 if vocab.size <= 1 << 16 else np.uint32)
        meta = dict(vocab=asdict(vocab), dtype=dtype.name, tokens={}, documents={}, sha256={})
        meta["sha256"]["tokenizer.json"] = sha256_of(out / "tokenizer.json")
        for part, order in ("val", range(n_val)), ("train", range(n_val, n_docs)):
            documents, path = read_documents(files, index, order, seed), out / f"{part}.bin"
            meta["documents"][part] = len(order)
            meta["tokens"][part], meta["sha256"][path.name] = tokenize(
                documents, tokenizer, vocab, dtype, path, len(order)
            )
        meta["asked"] = asked
        with atomic(out / "meta.json", "w") as g:
            json.dump(meta | {"check": check_of(meta)}, g, indent=1)
    tokens, documents = meta["tokens"], meta["documents"]
    print(
        f"{out}: {tokens['train']:,} tokens of {documents['train']:,} documents to train on, "
        f"{tokens['val']:,} of {documents['val']:,} to validate, vocabulary {vocab.size:,} "
        f"({dtype})"
    )


def bpe_sample(files, index, order, seed):
    """Texts for training a BPE: training documents, up to BPE_SAMPLE bytes."""
    seen = 0
    for pieces in read_documents(files, index, order, seed):
        yield [text for text, _ in pieces]
        seen += CHUNK
        if seen >= BPE_SAMPLE:
            return


def prepare_default(out=DEFAULT_DATA, vocab_size=2048):
    """The default corpus, from nothing but the installed packages."""
    text = Path(out) / "corpus.txt"
    if not text.exists():
        with lock(out):
            write_python_docs(text)
    prepare([text], out, vocab_size=vocab_size)


def sha256_of(path):
    digest = hashlib.sha256()
    with open_file(path) as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_of(meta):
    """Of all that meta.json says, so that no digit in it can change unseen."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


# Prepared data -> batches


def read_meta(directory):
    path = Path(directory) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta.pop("check") != check_of(meta):
            raise ValueError("not what was written")
        return meta
    except FileNotFoundError:
        fail(
            f"{path}: no such file; prepare data first: python data.py --input FILES --out "
            f"{directory}"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        fail(f"{path}: damaged ({e!r}); delete {directory} and prepare the data again")


class Data:
    """A prepared folder: .vocab, .meta, .tokenizer (the file) and rows of its token files.

    A row is n - 2 consecutive tokens between <s> and </s> (RoBERTa's FULL-SENTENCES): row i of
    part "train" is tokens i (n - 2) … (i + 1)(n - 2) of train.bin; the tokens after the last full
    row are not used."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.meta = read_meta(directory)
        self.vocab = Vocab(**self.meta["vocab"])
        self.tokenizer = self.directory / "tokenizer.json"
        self.tokens = {part: self.open(part) for part in ("train", "val")}
        if not self.tokenizer.is_file():
            fail(f"{self.tokenizer}: no such file; delete {directory} and prepare the data again")
        if sha256_of(self.tokenizer) != self.meta["sha256"]["tokenizer.json"]:
            fail(f"{self.tokenizer}: not the one that the tokens of {directory} were made with")

    def open(self, part):
        path, dtype = self.directory / f"{part}.bin", np.dtype(self.meta["dtype"])
        size = path.stat().st_size if path.is_file() else 0
        if size != self.meta["tokens"][part] * dtype.itemsize or size == 0:
            expected = f"{self.meta['tokens'][part]} {dtype} tokens of meta.json"
            fail(f"{path}: {size} bytes, not the {expected}; prepare the data again")
        return np.memmap(path, dtype, "r")

    def n_rows(self, part, n):
        return len(self.tokens[part]) // (n - 2)

    def left_over(self, n):
        """Training tokens behind the last full row of n, never seen."""
        return len(self.tokens["train"]) % (n - 2)

    def rows(self, part, indices, n):
        """Rows of n tokens at an array of indices: (B, n) int64."""
        tokens, count = self.tokens[part], self.n_rows(part, n)
        rows = np.empty((len(indices), n), np.int64)
        rows[:, 0], rows[:, -1] = self.vocab.bos, self.vocab.eos
        rows[:, 1:-1] = tokens[: count * (n - 2)].reshape(count, n - 2)[indices]
        if rows.max() >= self.vocab.size:
            where = self.directory / f"{part}.bin"
            fail(
                f"{where}: holds token {rows.max()}, the vocabulary has {self.vocab.size}: damaged"
            )
        return rows

    def batch(self, step, batch_size, n, k, seed):
        """The rows of a step, (B, n) int64: a function of (seed, step) alone. Row g = step · B +
        i of the run is row g mod N of epoch g div N, each epoch a permutation of all N rows.

        A row of mostly separators has fewer than k tokens that may be predicted: the next row of
        the file stands in for it."""
        count = self.n_rows("train", n)
        epoch, i = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
        for e in np.unique(epoch):
            i[epoch == e] = shuffled(i[epoch == e], count, (seed, 1, int(e)))
        return torch.from_numpy(self.full_rows("train", i, n, k))

    def full_rows(self, part, indices, n, k):
        """Rows with at least k tokens that are no specials, moving on to the next where one has
        fewer."""
        rows, count = self.rows(part, indices, n), self.n_rows(part, n)
        for _ in range(count):
            short = (~is_special(rows, self.vocab)).sum(1) < k
            if not short.any():
                return rows
            indices = np.where(short, (indices + 1) % count, indices)
            rows[short] = self.rows(part, indices[short], n)
        path = self.directory / f"{part}.bin"
        fail(
            f"{path}: no row of {n} has {k} tokens to predict: lower mask_rate, or longer "
            "documents (--doc)"
        )


# A row -> a corrupted row


class Corrupted(NamedTuple):
    """A batch as the models take it. All but n_replaced are int64 tensors; n_en + n_m = n."""

    inputs: torch.Tensor  # (B, n) tokens with [MASK]s and random tokens in place
    kept: torch.Tensor  # (B, n_en) positions that are not [MASK], ascending
    masked: torch.Tensor  # (B, n_m) positions that are [MASK], ascending
    predict: torch.Tensor  # (B, k) the masked, the replaced, the unchanged, each ascending
    labels: torch.Tensor  # (B, k) the original tokens there
    n_replaced: int  # with n_m it cuts predict into its three kinds

    def rows(self, start, stop):
        """The same for some of the rows."""
        return Corrupted(*(x[start:stop] for x in self[:-1]), self.n_replaced)

    def to(self, device):
        return Corrupted(*(x.to(device, non_blocking=True) for x in self[:-1]), self.n_replaced)


def counts(n, rate, strategy=(0.8, 0.1, 0.1)):
    """(k, n_m, n_replaced) of a row of n: exact, so that every row of every batch has the same
    shape.

    strategy: the shares of [MASK], random and unchanged among the k (Table 2c). Raises
    ValueError."""
    if not 0 < rate <= 1:
        raise ValueError(f"mask_rate is {rate}, must be above 0 and at most 1")
    if len(strategy) != 3 or not min(strategy) >= 0 or abs(sum(strategy) - 1) > 1e-6:
        raise ValueError(f"strategy is {strategy}, must be three shares that sum to 1")
    k = round(rate * (n - 2))
    n_m = round(strategy[0] * k)
    if k < 1:
        raise ValueError(f"mask_rate is {rate}: no token of a row of {n} is left to predict")
    return k, n_m, round((strategy[0] + strategy[1]) * k) - n_m


def corrupt(tokens, rate, strategy=(0.8, 0.1, 0.1), *, vocab, generator=None):
    """Choose k tokens of every row to predict; of these n_m become [MASK], n_replaced a random
    word, and the rest stay as they are (section 3.3). tokens (B, n) int64 -> Corrupted, on the
    tokens' device.

    Specials are never chosen and never drawn. Raises ValueError where a row has fewer than k
    other tokens; off the CPU that would cost a synchronisation, and Data.batch has seen to it
    already."""
    k, n_m, n_replaced = counts(tokens.size(1), rate, strategy)
    special = is_special(tokens, vocab)
    if tokens.device.type == "cpu" and int((~special).sum(1).min()) < k:
        raise ValueError(f"a row has fewer than {k} tokens that are not special; lower mask_rate")
    noise = torch.rand(tokens.shape, device=tokens.device, generator=generator)
    order = noise.masked_fill_(special, 2.0).argsort(dim=1)  # (B, n), the first k in random order
    masked, kept = order[:, :n_m].sort().values, order[:, n_m:].sort().values
    replaced = order[:, n_m : n_m + n_replaced].sort().values
    unchanged = order[:, n_m + n_replaced : k].sort().values
    ordinary = vocab.size - len(special_ids(vocab))
    words = torch.randint(ordinary, replaced.shape, device=tokens.device, generator=generator)
    for i in special_ids(vocab):  # ascending: step over each special
        words += words >= i
    inputs = tokens.scatter(1, masked, vocab.mask).scatter_(1, replaced, words)
    predict = torch.cat([masked, replaced, unchanged], dim=1)
    return Corrupted(inputs, kept, masked, predict, tokens.gather(1, predict), n_replaced)


def verify(directory):
    """Compare every file of a prepared folder with the hash that meta.json keeps of it."""
    for name, digest in read_meta(directory)["sha256"].items():
        path = Path(directory) / name
        if not path.is_file() or sha256_of(path) != digest:
            fail(
                f"{path}: missing or not what was written; delete {directory} and prepare it again"
            )
        print(f"{path}: as written")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    parser.add_argument(
        "--input", nargs="+", metavar="FILE", help="UTF-8 text files, or globs of them"
    )
    parser.add_argument(
        "--doc",
        choices=("blank", "line", "file"),
        default="blank",
        help="a document is: a run of non-blank lines (default), a line, a file",
    )
    parser.add_argument(
        "--tokenizer", help="use this tokenizer.json, RoBERTa's say (default: train one)"
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        help="of the BPE to train (default 16384; 2048 for the default corpus)",
    )
    parser.add_argument(
        "--out", help=f"the folder to write (default {DEFAULT_DATA} for the default corpus)"
    )
    parser.add_argument(
        "--val",
        type=float,
        default=0.01,
        help="share of the documents to validate on (default 0.01)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the documents' shuffle (default 0)")
    parser.add_argument(
        "--verify", metavar="DIR", help="check a prepared folder against its hashes"
    )
    args = parser.parse_args(argv)
    if args.verify:
        return verify(args.verify)
    if args.vocab_size is not None and not 262 <= args.vocab_size <= 1 << 24:
        fail(
            f"--vocab_size {args.vocab_size}: must be at least 262 (256 bytes, 5 specials, a merge)"
        )
    if not 0 < args.val < 1:
        fail(f"--val {args.val}: must be a share above 0 and below 1")
    if args.seed < 0:
        fail(f"--seed {args.seed}: must not be negative")
    if args.input is None:
        for name in ("tokenizer", "doc", "val", "seed"):
            if getattr(args, name) != parser.get_default(name):
                fail(f"--{name}: is for text of your own; give --input and --out too")
        return prepare_default(args.out or DEFAULT_DATA, args.vocab_size or 2048)
    if args.tokenizer and args.vocab_size:
        fail("--vocab_size: is for a tokenizer to be trained; leave it or --tokenizer out")
    if not args.out:
        fail("--out: missing; name the folder to write")
    files = []
    for pattern in args.input:
        exists = os.path.exists(pattern)  # a name may hold a * or [
        found = [pattern] if exists else sorted(glob.glob(pattern, recursive=True))
        files += [f for f in found if os.path.isfile(f)]
        if not any(os.path.isfile(f) for f in found):
            what = "a folder; give its files, as 'DIR/*.txt'" if found else "no such file"
            fail(f"--input {pattern}: {what}")
    files = [*{os.path.realpath(f): f for f in files}.values()]  # a text twice: in both parts
    if args.tokenizer:
        load_tokenizer(args.tokenizer)
    prepare(
        files, args.out, args.doc, args.tokenizer, args.vocab_size or 16384, args.val, args.seed
    )


if __name__ == "__main__":
    command(main, "interrupted; the same command begins again")
