"""Pre-train 3ML, or vanilla MLM beside it, on prepared tokens.

    torchrun train.py                            tiny: minutes on two CPU cores, makes its own data
    torchrun train.py --decoder none --mask_rate 0.15 --out out/vanilla         its control
    torchrun --nproc_per_node 8 train.py --recipe efficient-large --data data/mine
    torchrun train.py --out out/tiny --eval_only      evaluate a checkpoint and export it

The same command goes on where a run was interrupted. It leaves in --out: ckpt.pt and ckpt.prev.pt
(all that going on needs), log.jsonl (a line per log_every steps and per evaluation), config.json,
and hf/ (the encoder for finetune.py and for transformers; vanilla MLM with its head).

What it does not do: shard a model over GPUs, choose hyper-parameters, or touch the network.

Rows and masks are a function of (seed, step, row), dropout of (seed, step, micro-batch): the number
of processes and interruptions change nothing but the order of sums; another size of micro-batches
changes dropout's noise too.
"""

import argparse
import ctypes
import importlib.util
import json
import math
import os
import platform
import signal
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import flops
from data import (
    DEFAULT_DATA,
    Corrupted,
    Data,
    atomic,
    command,
    corrupt,
    counts,
    fail,
    load_tokenizer,
    lock,
    prepare_default,
    seed_of,
    special_ids,
)
from model import MaskedLM, ModelConfig, load_pretrained, save_pretrained


def option(default, text, **more):
    return field(default=default, metadata=dict(help=text, **more))


@dataclass
class Config:
    """Every field is a flag. The defaults are what Table 4's two recipes share."""

    data: str = option(DEFAULT_DATA, "folder that data.py has prepared")
    out: str = option("", "folder of this run (default: out/RECIPE)")
    init: str = option("", "Hugging Face RoBERTa folder whose encoder to start from")
    # model
    decoder: str = option("self", "3ML's decoder: self, cross; none: vanilla MLM")
    norm: str = option("", "LayerNorm: post, pre (default: pre for tiny, large and cross; Table 4)")
    n_layer: int = option(12, "layers of the encoder")
    n_embd: int = option(768, "width of the encoder")
    head_size: int = option(64, "of every attention head")
    n_layer_dec: int = option(2, "layers of the decoder")
    n_embd_dec: int = option(0, "width of the decoder (default: half the encoder's)")
    n_positions: int = option(0, "longest row the model can take (default: seq_len)")
    dropout: float = option(0.1, "of hidden states and attention weights")
    # corruption
    mask_rate: float = option(0.4, "share r of the tokens to predict")
    strategy: tuple = option((0.8, 0.1, 0.1), "shares of [MASK], random and unchanged among them")
    # optimisation
    seq_len: int = option(512, "tokens of a row, <s> and </s> included")
    batch_size: int = option(2048, "rows of a step, over all processes and micro-batches")
    max_steps: int = option(125_000, "steps of the run", may_change=True)
    lr: float = option(7e-4, "peak of the learning rate")
    warmup: float = option(0.06, "share of the steps in which the learning rate rises from 0")
    weight_decay: float = option(0.01, "AdamW's, on parameters of two dimensions and more")
    grad_clip: float = option(0.0, "largest gradient norm, 0: any", may_change=True)
    seed: int = option(0, "of initialisation, rows, masks and dropout")
    # the work's division, and what is written when: none of these changes the result, but for
    # rounding (dtype, compile) and for dropout's noise (micro_batch_size)
    micro_batch_size: int = option(64, "rows that go through a process at once", may_change=True)
    eval_every: int = option(1000, "steps between evaluations", may_change=True)
    eval_rows: int = option(1024, "rows of the validation set")
    save_every: int = option(1000, "steps between checkpoints", may_change=True)
    log_every: int = option(50, "steps between lines of the log", may_change=True)
    dtype: str = option("auto", "bf16, fp16, fp32, fp64 (auto: by hardware)", may_change=True)
    device: str = option("auto", "cuda, mps or cpu (auto: the first there is)", may_change=True)
    compile: str = option("auto", "torch.compile: yes, no (auto: on CUDA)", may_change=True)
    timeout: float = option(10.0, "minutes to wait for a process that is silent", may_change=True)


# Table 4, and one of ours for a first look
RECIPES = {
    "tiny": dict(
        n_layer=3, n_embd=256, norm="pre", dropout=0.0, mask_rate=0.5, seq_len=64,
        batch_size=32, micro_batch_size=32, max_steps=3100, lr=4e-3, eval_every=400, save_every=400,
    ),
    "efficient-large": dict(
        n_layer=24, n_embd=1024, mask_rate=0.5, norm="pre", seq_len=128, batch_size=4096,
        micro_batch_size=256, max_steps=23_000, lr=2e-3,
    ),
    "longer-base": dict(),
}  # fmt: skip
COMMON_RATE = 0.15  # validation at different rates cannot be compared: every run has this one too


# The command line


def number_list(text):
    return tuple(float(x) for x in text.split(","))


def parse(argv=None):
    """The command line as (Config, arguments that are no fields)."""
    recipes = "\n".join(
        f"  {name}: " + (", ".join(f"{k} {v}" for k, v in recipe.items()) or "the defaults")
        for name, recipe in RECIPES.items()
    )
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"* may change when a run goes on; nothing else may.\n\nThe recipes:\n{recipes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    parser.add_argument(
        "--recipe", choices=RECIPES, default="tiny", help="Table 4's (default: tiny)"
    )
    parser.add_argument("--eval_only", action="store_true", help="evaluate the checkpoint in --out")
    for f in fields(Config):
        text = f.metadata["help"] + " *" * f.metadata.get("may_change", False)
        if "default" not in text and "auto" not in text and f.default != "":
            shown = ",".join(map(str, f.default)) if f.type is tuple else f.default
            own = [
                f"; {name}: {recipe[f.name]}"
                for name, recipe in RECIPES.items()
                if f.name in recipe
            ]
            text += f" (default: {shown}{''.join(own)})"
        kind = number_list if f.type is tuple else f.type
        shown = {int: "N", float: "X", str: "TEXT", tuple: "X,X,X"}[f.type]
        parser.add_argument(
            f"--{f.name}", type=kind, help=text, default=argparse.SUPPRESS, metavar=shown
        )
    args = vars(parser.parse_args(argv))
    recipe, eval_only = args.pop("recipe"), args.pop("eval_only")
    fields_of_run = {"out": f"out/{recipe}", **RECIPES[recipe]}
    if eval_only:
        fields_of_run = read_config(args.get("out", fields_of_run["out"]))
    config = Config(**{**fields_of_run, **args})
    if config.init and not eval_only:
        config = shape_of_init(config, args)
    config.norm = config.norm or ("pre" if config.decoder == "cross" else "post")
    config.n_positions = config.n_positions or config.seq_len
    config.n_embd_dec = config.n_embd_dec or config.n_embd // 2
    check(config)
    return config, eval_only


def read_config(out):
    """The fields of the run in a folder, for evaluating it without repeating its flags."""
    path = Path(out) / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved = {f.name: saved[f.name] for f in fields(Config)}
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"--eval_only: {path} is missing or damaged; name the folder of a run with --out")
    return saved | {"strategy": tuple(saved["strategy"]), "out": str(out)}


def shape_of_init(config, given):
    """The encoder's shape is that of the folder to start from; a flag that contradicts it is an
    error."""
    try:
        shape = load_pretrained(config.init)[0]
    except ValueError as e:
        fail(f"--init {e}")
    names = ("n_layer", "n_embd", "head_size", "norm", "n_positions")
    shape = {name: getattr(shape, name) for name in names}
    for name in shape.keys() & given.keys():
        if given[name] != shape[name]:
            fail(
                f"--{name} {given[name]}: the encoder in {config.init} has {shape[name]}; leave it "
                "out"
            )
    return replace(config, **shape)


def check(config):
    """What can be wrong with a Config in itself; one line and exit 2."""
    c = config
    sizes = (
        "seq_len batch_size max_steps micro_batch_size eval_every eval_rows save_every log_every"
    )
    for name in sizes.split():
        if getattr(c, name) < 1:
            fail(f"--{name} {getattr(c, name)}: must be at least 1")
    for name in ("lr", "weight_decay", "grad_clip", "seed"):
        if not 0 <= getattr(c, name) < math.inf:
            fail(f"--{name} {getattr(c, name)}: must be a number of at least 0")
    if not 0 < c.timeout < math.inf:
        fail(f"--timeout {c.timeout}: must be a number of minutes above 0")
    if not 0 <= c.warmup <= 1:
        fail(f"--warmup {c.warmup}: must be a share of the steps, from 0 to 1")
    if not 3 <= c.seq_len <= c.n_positions:
        fail(f"--seq_len {c.seq_len}: must be at least 3 and at most n_positions, {c.n_positions}")
    for name, choices in (
        ("dtype", ("auto", *DTYPES)),
        ("device", ("auto", "cuda", "mps", "cpu")),
        ("compile", ("auto", "yes", "no")),
    ):
        if getattr(c, name) not in choices:
            fail(f"--{name} {getattr(c, name)}: choose from {', '.join(choices)}")
    try:
        model_config(c, vocab_size=8)
        _, n_m, _ = counts(c.seq_len, c.mask_rate, c.strategy)
        if c.decoder != "none" and n_m < 1:
            fail(f"--strategy {c.strategy}: leaves no [MASK] to decode; use --decoder none")
    except ValueError as e:
        fail(f"--{e}")
    try:
        counts(c.seq_len, COMMON_RATE, c.strategy)
    except ValueError:
        fail(f"--seq_len {c.seq_len}: too short for the validation at {COMMON_RATE:.0%}")


def model_config(config, vocab_size):
    c = config
    return ModelConfig(
        vocab_size, c.n_positions, c.n_layer, c.n_embd, c.head_size, c.decoder, c.n_layer_dec,
        c.n_embd_dec or None, c.norm, c.dropout,
    )  # fmt: skip


# The machine

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32, fp64=torch.float64)
# dense bf16 or fp16 peaks in FLOP/s, by what the name of the GPU holds
PEAKS = {
    "H100 80GB HBM3": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "NVIDIA H200": 989e12,
    "A100": 312e12, "L40S": 362e12, "V100-SXM": 125e12, "V100-PCIE": 112e12, "Tesla T4": 65e12,
}  # fmt: skip


@dataclass
class Machine:
    """This process's place: its rank among world processes, its device and precision."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self):
        enabled = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def sum(self, values):
        """A list of numbers, each summed over the processes."""
        if self.world == 1:
            return [float(v) for v in values]
        values = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return values.tolist()

    def say(self, text):
        if self.rank == 0:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # the reader (tee, head) is gone, the run is not
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def pick_device(name="auto"):
    """The torch.device to use; with several processes on a node, this one's GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if name == "cpu" and torch.backends.mps.is_available() else name
    elif name == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch sees no GPU here; use --device cpu")
    elif name == "mps" and not torch.backends.mps.is_available():
        fail("--device mps: not available here; use --device cpu")
    if name != "cuda":
        return torch.device(name)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def pick_dtype(name, device):
    """bf16 where the hardware multiplies it, fp16 on older GPUs, else fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type == "cpu" and has_bf16() else torch.float32


def keep_freed_memory():
    """glibc gives every large tensor back to the system and pays a page fault for each page of
    the next; kept, a CPU step takes half the time."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mmap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


def die_with_torchrun():
    """torchrun's workers have sessions of their own: without this, kill -9 of torchrun would leave
    them running, and the folder locked."""
    if platform.system() == "Linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes():
            sys.exit(1)  # it died before that line


def out_of_memory(error):
    kinds = (MemoryError, torch.OutOfMemoryError)
    texts = ("can't allocate memory", "out of memory")  # the CPU's, CUDA's own and MPS's
    return isinstance(error, kinds) or any(text in str(error) for text in texts)


def lost_process(error):
    """Did another process of the group die, or stay silent too long?"""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@contextmanager
def start(config):
    """The Machine for this process, inside torchrun's process group if there is one."""
    die_with_torchrun()
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    device = pick_device(config.device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        if world > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=config.timeout))
        yield Machine(rank, world, device, pick_dtype(config.dtype, device))
    except (RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            rows = min(config.micro_batch_size, config.batch_size // world)
            advice = f"--micro_batch_size below {rows} takes less, and the same run goes on with it"
            advice = advice if rows > 1 else "the model is too large"
            fail(f"out of memory on {device}: {advice}", everywhere=True)
        if not lost_process(e):
            raise
        reason = str(e).splitlines()[0]
        fail(
            f"another process died, or was silent for {config.timeout:g} minutes ({reason}); the "
            f"same command goes on from the last checkpoint in {config.out}"
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def peak_flops(machine):
    """FLOP/s of a matrix product at best: a known GPU's published peak, else one measured here."""
    if machine.device.type == "cuda":
        name = torch.cuda.get_device_name(machine.device)
        if machine.dtype in (torch.bfloat16, torch.float16):
            return next((peak for key, peak in PEAKS.items() if key in name), None)
        return None
    if machine.device.type != "cpu" or machine.dtype == torch.float16:  # slow there, and rare
        return None
    a = torch.randn(2048, 2048, dtype=machine.dtype)
    best, end = 0, time.perf_counter() + 0.3
    while time.perf_counter() < end:
        t = time.perf_counter()
        a @ a
        best = max(best, 2 * 2048**3 / (time.perf_counter() - t))
    return best


# One step


def lr_at(step, config):
    """Learning rate of step 0, 1, …: up from 0 over the warm-up, then down to 0, both linear."""
    warmup = round(config.warmup * config.max_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * (config.max_steps - step) / max(1, config.max_steps - warmup)


def make_optimizer(model, config):
    """AdamW; decay on matrices only, as 24hBERT has it (fairseq decays everything)."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        dict(params=matrices, weight_decay=config.weight_decay),
        dict(params=vectors, weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def step_batch(data, config, step, device):
    """The corrupted rows of a step, of all processes: each draws them all, a megabyte or so, and
    takes its own, so that how many there are cannot matter."""
    k, *_ = counts(config.seq_len, config.mask_rate, config.strategy)
    rows = data.batch(step, config.batch_size, config.seq_len, k, config.seed)
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    generator = torch.Generator(device).manual_seed(seed_of(config.seed, 2, step))
    return corrupt(
        rows.to(device), config.mask_rate, config.strategy, vocab=data.vocab, generator=generator
    )


def backward(model, batch, config, step, machine, scaler=None):
    """Gradients of the mean loss over the whole batch, this process doing its share in
    micro-batches.

    model is a MaskedLM, in DistributedDataParallel if there are several processes (it averages
    their gradients). Returns this process's mean loss, a tensor in nats."""
    share = config.batch_size // machine.world
    micro = min(config.micro_batch_size, share)
    total = 0.0
    for at in range(machine.rank * share, (machine.rank + 1) * share, micro):
        torch.manual_seed(seed_of(config.seed, 3, step, at // micro))  # dropout
        last = at + micro == (machine.rank + 1) * share
        with nullcontext() if last or machine.world == 1 else model.no_sync():
            with machine.autocast():
                loss = model(batch.rows(at, at + micro)).mean() * (micro / share)
            (loss if scaler is None else scaler.scale(loss)).backward()
        total = total + loss.detach()
    return total


# Evaluation


def validation_batches(data, config):
    """{rate: Corrupted} of the same rows under fixed masks: the run's own rate, and the common
    15%. Drawn on the CPU, so that every device has the same."""
    count = min(config.eval_rows, data.n_rows("val", config.seq_len))
    batches = {}
    for rate in (config.mask_rate, COMMON_RATE):
        k, *_ = counts(config.seq_len, rate, config.strategy)
        rows = data.full_rows("val", np.arange(count), config.seq_len, k)
        g = torch.Generator().manual_seed(0)
        batches[rate] = corrupt(
            torch.from_numpy(rows), rate, config.strategy, vocab=data.vocab, generator=g
        )
    return batches


def by_kind(losses, batch):
    """[sums of masked, replaced and unchanged tokens' losses, and their counts]; losses (B, k)."""
    n_m, n_r, k = batch.masked.size(1), batch.n_replaced, losses.size(1)
    parts = losses.split([n_m, n_r, k - n_m - n_r], dim=1)
    return [float(p.sum()) for p in parts] + [p.numel() for p in parts]


def means(sums):
    """by_kind's sums as mean nats: over all, masked, replaced, unchanged; None where there are
    none."""
    pairs = [(sum(sums[:3]), sum(sums[3:])), *zip(sums[:3], sums[3:])]
    return [s / c if c else None for s, c in pairs]


def finite(x):
    """For JSON, which has no infinity (fp16's skipped steps have)."""
    return float(x) if math.isfinite(x) else None


def number(x):
    """A perplexity for people; there is none of a kind of token that the strategy does not have."""
    return "-" if x is None else f"{x:,.1f}"


def perplexity(nats):
    return None if nats is None else math.exp(min(nats, 700))


@torch.no_grad()
def evaluate(model, batches, config, machine):
    """Validation loss in nats and perplexities, on all processes; a dict for the log."""
    model.eval()
    result, size = {}, config.micro_batch_size
    for rate, batch in batches.items():
        sums = np.zeros(6)
        for at in range(machine.rank * size, len(batch.inputs), machine.world * size):
            part = batch.rows(at, at + size).to(machine.device)
            with machine.autocast():
                sums += by_kind(model(part), part)
        nats = means(machine.sum(sums.tolist()))
        names = ["ppl", "ppl_masked", "ppl_replaced", "ppl_unchanged"]
        tag = "_15" if rate != config.mask_rate else ""
        result[f"val_loss{tag}"] = nats[0]
        result |= {name + tag: perplexity(x) for name, x in zip(names, nats)}
    model.train()
    return result


# Checkpoints and the log


def save_checkpoint(path, state):
    """Replace ckpt.pt, keeping the one before as ckpt.prev.pt; at every moment one of the two is
    whole."""
    with atomic(path.with_name("ckpt.new.pt")) as f:
        try:
            torch.save(state, f)
        except RuntimeError as e:  # what torch makes of a full disk
            raise OSError(f"the disk is full, torch.save says: {str(e).splitlines()[0]}") from e
    if path.exists():
        os.replace(path, path.with_name("ckpt.prev.pt"))
    os.replace(path.with_name("ckpt.new.pt"), path)


def checkpoints(out):
    """The files to go on from, the newer first; ckpt.new.pt, not yet in place, is none."""
    return [path for path in (out / "ckpt.pt", out / "ckpt.prev.pt") if path.exists()]


def load_checkpoint(out):
    """The state in ckpt.pt, or in ckpt.prev.pt if that is damaged; None if there is neither."""
    problems = []
    for candidate in checkpoints(out):
        try:
            damaged = zipfile.ZipFile(candidate).testzip()  # torch.load checks no checksums
            if damaged is None:
                state = torch.load(candidate, map_location="cpu", weights_only=True)
                for problem in problems:
                    print(f"warning: {problem}; going on from {candidate}", flush=True)
                return state
            problems.append(f"{candidate}: damaged at {damaged}")
        except Exception as e:
            problems.append(f"{candidate}: cannot be read ({type(e).__name__})")
    if problems:
        fail("; ".join(problems) + "; move them away to start from the beginning")


def same_run(config, saved):
    """Refuse to go on with a checkpoint of another run, naming the field and both values."""
    derived = ("norm", "n_embd_dec", "n_positions")  # named only if nothing else is to blame
    for f in sorted(fields(Config), key=lambda f: f.name in derived):
        old, new = saved.get(f.name), getattr(config, f.name)
        old = tuple(old) if f.type is tuple else old
        free = f.name in ("out", "data") or f.metadata.get("may_change")
        if f.name == "init":
            free = bool(new and old) and os.path.realpath(new) == os.path.realpath(old)
        if old != new and not free:
            fail(
                f"--{f.name} {new or 'missing'}: the run in {config.out} has {old or 'none'}; go "
                "on with that, or choose another --out"
            )


class Log:
    """log.jsonl: a JSON object a line. A run that goes on from a step drops what came after it."""

    def __init__(self, path, step):
        self.path = path
        lines = []
        if path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        lines.append(line.decode() + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a crash
        with atomic(path, "w") as f:
            f.writelines(lines)
        self.lines = [json.loads(line) for line in lines if '"val_loss"' in line]

    def write(self, entry):
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(entry) + "\n")
        except OSError as e:
            fail(f"{self.path}: cannot be written ({e.strerror}); the last checkpoint is whole")
        if "val_loss" in entry:
            self.lines.append(entry)


@contextmanager
def interrupts():
    """A list that a SIGTERM or Ctrl-C is put into, so that a step can be finished first; a second
    one ends the program at once."""
    caught = []

    def handler(number, frame):
        if caught:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        caught.append(number)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with suppress(OSError):  # nobody may be reading
                os.write(2, b"\nfinishing this step, then saving; once more stops at once\n")

    old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for s, h in old.items():
            signal.signal(s, h)


# The loop


def train(model, data, config, machine, log, state, caught):
    """Steps from where `state` (a checkpoint or None) ends up to max_steps, or until a signal is
    caught. Returns the number of steps done, and whether a signal, to any process, ended it."""
    out, raw = Path(config.out), model
    optimizer = make_optimizer(raw, config)
    scaler = torch.amp.GradScaler(machine.device.type) if machine.dtype == torch.float16 else None
    first = 0
    if state is not None:
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        state.clear()  # gigabytes, for a large model
    if machine.world > 1:
        gpu = [machine.device] if machine.device.type == "cuda" else None
        model = DistributedDataParallel(model, gpu, gradient_as_bucket_view=True)  # saves a copy
    if use_compile(config, machine):
        model.compile()  # in place: the parameters keep their names
    k, n_m, _ = counts(config.seq_len, config.mask_rate, config.strategy)
    row_flops = 3 * flops.forward(raw.config, config.seq_len, n_m, k)  # backward takes 2 x forward
    peak = peak_flops(machine)
    val = validation_batches(data, config)

    def save(done):
        if machine.rank == 0:
            state = {
                "step": done, "config": asdict(config), "data": data.meta["sha256"],
                "model": raw.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler and scaler.state_dict(),
            }  # fmt: skip
            save_checkpoint(out / "ckpt.pt", state)

    bar = tqdm(
        total=config.max_steps, initial=first, desc="training", unit="step",
        disable=None if machine.rank == 0 else True,
    )  # fmt: skip
    batch = step_batch(data, config, first, machine.device)
    clock, since = time.perf_counter(), first
    for step in range(first, config.max_steps):
        lr = lr_at(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = backward(model, batch, config, step, machine, scaler)
        done, current = step + 1, batch
        if done < config.max_steps:  # made while the device is busy with this one
            batch = step_batch(data, config, done, machine.device)
        if scaler:
            scaler.unscale_(optimizer)
        grads = [p.grad for p in raw.parameters()]
        norm = torch.nn.utils.get_total_norm(grads)
        if config.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(raw.parameters(), config.grad_clip, norm)
        loss, stop = machine.sum([float(loss) / machine.world, len(caught)])
        stop_if_diverged(loss, float(norm), scaler, step, lr, out)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update()
        if done % config.log_every == 0 or done == config.max_steps:
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            rows_per_s = (done - since) * config.batch_size / seconds
            since = done
            if machine.rank == 0:
                entry = {
                    "step": done, "loss": loss, "lr": lr, "grad_norm": finite(norm),
                    "tokens_per_s": round(rows_per_s * config.seq_len),
                    "mfu": peak and round(rows_per_s * row_flops / (peak * machine.world), 4),
                    # of the step's rows and masks: do two runs see the same?
                    "rows": zlib.crc32(current.inputs.cpu().numpy().tobytes()),
                }  # fmt: skip
                log.write(entry)
                machine.say(
                    f"step {done:>6}/{config.max_steps}  loss {loss:.3f}  lr {lr:.2e}  grad "
                    f"{norm:.2f}  {entry['tokens_per_s']:,} tok/s"
                    + (f"  mfu {entry['mfu']:.0%}" if peak else "")
                )
        stopping = stop > 0 or done == config.max_steps
        if done % config.eval_every == 0 or done == config.max_steps:
            start = time.perf_counter()
            entry = {"step": done} | evaluate(raw, val, config, machine)
            if machine.rank == 0:
                log.write(entry)
            machine.say(
                f"step {done:>6}/{config.max_steps}  validation loss {entry['val_loss']:.3f}  "
                f"perplexity {number(entry['ppl'])}, of masked tokens {number(entry['ppl_masked'])}"
            )
            clock += time.perf_counter() - start
        if done % config.save_every == 0 or stopping:
            start = time.perf_counter()
            save(done)
            clock += time.perf_counter() - start
        if stopping:
            break
    bar.close()
    return done, stop > 0


def use_compile(config, machine):
    if config.compile == "auto":
        return machine.device.type == "cuda"
    return config.compile == "yes"


def stop_if_diverged(loss, norm, scaler, step, lr, out):
    """Before the optimizer moves, so that the last checkpoint is a good one. fp16's scaler skips
    a step with infinite gradients and lowers its scale; only when that does not help has the run
    diverged."""
    fine = math.isfinite(norm) if scaler is None else scaler.get_scale() > 1e-4
    if not (math.isfinite(loss) and fine):
        what = "go on from its checkpoint" if (out / "ckpt.pt").exists() else "start again"
        fail(
            f"step {step + 1}, lr {lr:.2e}: loss {loss}, gradient norm {norm}: the run in {out} "
            f"has diverged; {what} with --grad_clip 1 (Table 4's advice), or lower --lr in another "
            "--out"
        )


# What a person wants to see at the end


def unigram_nats(data, batch, counted=1 << 24):
    """by_kind's sums for the model that knows how frequent words are and nothing else."""
    freq = np.bincount(data.tokens["train"][:counted], minlength=data.vocab.size).astype(float)
    freq[special_ids(data.vocab)] = 0  # never to be predicted
    nats = -np.log((freq + 1) / (freq + 1).sum())
    return by_kind(torch.from_numpy(nats[batch.labels.numpy()]), batch)


def report(model, data, config, machine, log, steps):
    """Print perplexities, filled-in sentences, FLOPs, and where things lie."""
    val, last = validation_batches(data, config), log.lines[-1]
    names = ["ppl", "ppl_masked", "ppl_replaced", "ppl_unchanged"]
    shown = {"self": "3ML-self", "cross": "3ML-cross", "none": "vanilla MLM"}[config.decoder]
    print(
        f"\n{'validation perplexity':<36}{'all':>9}{'masked':>9}{'replaced':>10}{'unchanged':>11}"
    )
    for rate, batch in val.items():
        tag = "_15" if rate != config.mask_rate else ""
        rows = (
            (shown, [last[name + tag] for name in names]),
            ("unigram", [perplexity(x) for x in means(unigram_nats(data, batch))]),
        )
        for name, values in rows:
            cells = [number(x) for x in values]
            label = f"{name}, {rate:.0%} of tokens predicted"
            print(f"{label:<36}{cells[0]:>9}{cells[1]:>9}{cells[2]:>10}{cells[3]:>11}")
    show_sentences(model, data, val[COMMON_RATE], config, machine)
    k, n_m, _ = counts(config.seq_len, config.mask_rate, config.strategy)
    spent = 3 * flops.forward(model.config, config.seq_len, n_m, k)
    k, n_m, _ = counts(config.seq_len, COMMON_RATE, config.strategy)
    vanilla = replace(model.config, decoder="none")
    vanilla = 3 * flops.forward(vanilla, config.seq_len, n_m, k)
    rows = steps * config.batch_size
    print(
        f"\nFLOPs of {rows * config.seq_len:,} tokens, forward and backward: "
        f"{spent * rows:.2e}; vanilla MLM at 15% takes {vanilla * rows:.2e}, {vanilla / spent:.2f} "
        "times as many"
    )
    out = Path(config.out)
    what = "the encoder and its head" if config.decoder == "none" else "the encoder"
    print(
        f"\n{out}/hf: {what}, for  python finetune.py --task CoLA --glue GLUE_DIR --init {out}/hf"
    )
    print(f"{' ' * len(str(out))}     or  transformers.AutoModel.from_pretrained('{out}/hf')")
    print(f"{out}/log.jsonl: the numbers of the run; {out}/ckpt.pt: everything, the decoder too")


@torch.no_grad()
def show_sentences(model, data, batch, config, machine, number=5, length=36):
    """Validation text at the common rate with the model's guesses in place of its [MASK]s."""
    if importlib.util.find_spec("tokenizers") is None:
        print("\n(to see validation text with its masks filled in: pip install tokenizers)")
        return
    tokenizer, _ = load_tokenizer(data.tokenizer)
    spread = torch.linspace(0, len(batch.inputs) - 1, number).long()
    batch = Corrupted(*(x[spread] for x in batch[:-1]), batch.n_replaced).to(machine.device)
    model.eval()
    with machine.autocast():
        guesses = model.logits(batch).argmax(-1).cpu()  # (number, k)
    model.train()
    print("\nvalidation text, [guess] where a [MASK] was guessed right, [guess/truth] where not:")
    n_m = batch.masked.size(1)
    for i in range(len(guesses)):
        text = batch.inputs[i].cpu()
        text[batch.predict[i].cpu()] = batch.labels[i].cpu()
        words = [tokenizer.decode([t]) for t in text.tolist()]
        for at, guess in zip(batch.masked[i].tolist(), guesses[i, :n_m].tolist()):
            space = " " * words[at].startswith(" ")
            guess, truth = tokenizer.decode([guess]).strip(), words[at].strip()
            words[at] = f"{space}[{guess}]" if guess == truth else f"{space}[{guess}/{truth}]"
        print("  " + " ".join("".join(words[1 : 1 + length]).split()))


# The run


def prepare_run(config, machine):
    """Data and model of a run; makes the default corpus where there is none yet."""
    share = config.batch_size / machine.world
    micro = min(config.micro_batch_size, share)
    if share % 1 or share % micro:
        fail(
            f"--batch_size {config.batch_size}: must divide into equal shares for {machine.world} "
            f"process(es), and these into equal micro-batches of at most {config.micro_batch_size}"
        )
    if config.data == DEFAULT_DATA:
        if machine.rank == 0 and not (Path(config.data) / "meta.json").exists():
            machine.say(f"no data yet: making {config.data} from the installed Python's docstrings")
            prepare_default(config.data)
        if machine.world > 1:
            dist.barrier()
    data = Data(config.data)
    for part in ("train", "val"):
        if data.n_rows(part, config.seq_len) < 1:
            fail(f"{config.data}/{part}.bin: shorter than one row of --seq_len {config.seq_len}")
    torch.manual_seed(seed_of(config.seed, 4))
    model = MaskedLM(model_config(config, data.vocab.size))
    if config.init and not checkpoints(Path(config.out)):
        shape, encoder = load_pretrained(config.init)
        if shape.vocab_size != data.vocab.size:
            fail(
                f"--init {config.init}: vocabulary of {shape.vocab_size}, {config.data} has "
                f"{data.vocab.size}; prepare the data with its --tokenizer"
            )
        model.encoder.load_state_dict(encoder.state_dict())
    return data, model


def resume(config, machine, data, model):
    """(state, log) to go on with: the checkpoint's, or (None, new log)."""
    out = Path(config.out)
    state = load_checkpoint(out)
    if state is not None:
        same_run(config, state["config"])
        if state["data"] != data.meta["sha256"]:
            fail(f"--data {config.data}: not the data that the run in {out} was trained on")
        if state["config"]["max_steps"] != config.max_steps:
            machine.say(
                f"warning: --max_steps was {state['config']['max_steps']}, is {config.max_steps}: "
                "the learning rate's schedule changes with it"
            )
        model.load_state_dict(state.pop("model"))
        machine.say(f"{out}: {state['step']} of {config.max_steps} steps are done")
    step = state["step"] if state else 0
    if machine.sum([step])[0] != step * machine.world:
        fail(
            f"{out}: not the same checkpoint for every process; --out must be on a shared file "
            "system"
        )
    return state, Log(out / "log.jsonl", step) if machine.rank == 0 else None


def main(argv=None):
    config, eval_only = parse(argv)
    with start(config) as machine, lock(config.out) if machine.rank == 0 else nullcontext():
        data, model = prepare_run(config, machine)
        out = Path(config.out)
        if eval_only and not checkpoints(out):
            fail(f"--eval_only: no checkpoint in {out}")
        state, log = resume(config, machine, data, model)
        if machine.rank == 0 and not eval_only:
            with atomic(out / "config.json", "w") as f:
                json.dump(asdict(config) | {"torch": torch.__version__}, f, indent=1)
        model.to(machine.device, torch.float64 if machine.dtype == torch.float64 else torch.float32)
        k, n_m, n_r = counts(config.seq_len, config.mask_rate, config.strategy)
        machine.say(
            f"{sum(p.numel() for p in model.parameters()):,} parameters on {machine.world} x "
            f"{machine.device.type} in {str(machine.dtype)[6:]}; rows of {config.seq_len}: {n_m} "
            f"masked, {n_r} replaced, {k - n_m - n_r} unchanged; "
            f"{data.n_rows('train', config.seq_len):,} rows an epoch, "
            f"{data.left_over(config.seq_len)} tokens left over"
        )
        finished = state is not None and state["step"] >= config.max_steps
        if finished and not eval_only:
            machine.say("the run is finished; for a new one, choose another --out")
        if finished or eval_only:
            steps = state["step"]
            entry = evaluate(model, validation_batches(data, config), config, machine)
            if machine.rank == 0:
                log.lines.append({"step": steps} | entry)
        else:
            with interrupts() as caught:
                steps, stopped = train(model, data, config, machine, log, state, caught)
            if stopped:
                machine.say(f"stopped after step {steps}; the same command goes on from there")
                sys.exit(128 + (caught[0] if caught else signal.SIGTERM))
        if machine.rank == 0:
            try:
                save_pretrained(model, out / "hf", data.tokenizer)
            except OSError as e:
                fail(f"{out}/hf: {e}; free some space, then the same command writes it")
            report(model, data, config, machine, log, steps)


if __name__ == "__main__":
    command(main, "interrupted")
