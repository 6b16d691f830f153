"""Pre-train 3ML, or vanilla MLM for comparison, on prepared tokens.

    torchrun train.py                            tiny: minutes on two CPU cores; prepares its own data
    torchrun train.py --decoder none --mask_rate 0.15 --out out/vanilla         the vanilla MLM beside it
    torchrun --nproc_per_node 8 train.py --recipe efficient-large --data data/mine
    torchrun train.py --out out/tiny --eval_only      evaluate the checkpoint of a run and export it
    python train.py --out out/tiny --fill "returns the <mask> of a list"      the likeliest words

The same command resumes an interrupted run. A run writes to --out: ckpt.pt and ckpt.prev.pt (all that
resuming needs), log.jsonl, config.json, and hf/ (the encoder, for finetune.py and transformers; vanilla MLM's
has its head). Rows and masks are a function of (seed, step, row), dropout of (seed, step, first row of the
micro-batch), so the number of processes and interruptions change nothing but the order of sums. This file
does not shard a model or search for hyperparameters. Without torchrun, `python train.py` does the same."""

import atexit
import ctypes
import json
import math
import os
import platform
import signal
import sys
import time
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import flops
from data import Data, atomic, command, corrupt, counts, fail, lock, masked_text, parse_flags, seed_of, write
from data import main as prepare_default_data
from model import MaskedLM, ModelConfig, load_pretrained, save_pretrained

# Table 4, and one of ours for a first look. longer-base is the defaults below.
RECIPES = {
    "tiny": dict(n_layer=3, n_embd=256, norm="pre", dropout=0.0, mask_rate=0.5, seq_len=64, batch_size=32,
                 max_steps=2700, lr=4e-3, eval_every=400, save_every=400),
    "efficient-large": dict(n_layer=24, n_embd=1024, norm="pre", mask_rate=0.5, seq_len=128, batch_size=4096,
                            micro_batch_size=256, max_steps=23_000, lr=2e-3),
    "longer-base": dict(),
}  # fmt: skip
COMMON_RATE = 0.15  # losses at different rates cannot be compared, so every run is evaluated here too


@dataclass
class Run(ModelConfig):
    """With ModelConfig's, the fields that identify a run. Resuming with other values is refused."""

    n_positions: int = None  # longest row that the model can take (default: seq_len)
    init: str = ""  # Hugging Face folder of a RoBERTa whose encoder to start from
    mask_rate: float = 0.4  # share r of the tokens to predict
    strategy: list[float] = (0.8, 0.1, 0.1)  # shares of [MASK], random and unchanged among them
    seq_len: int = 512  # tokens of a row, <s> and </s> included
    batch_size: int = 2048  # rows of a step, over all processes and micro-batches
    lr: float = 7e-4  # peak learning rate
    warmup: float = 0.06  # share of the steps in which the learning rate rises from 0
    weight_decay: float = 0.01  # AdamW's weight decay, on matrices only
    eval_rows: int = 1024  # rows of the validation set to evaluate on
    seed: int = 0  # seed of initialization, rows, masks and dropout

    def __post_init__(self):
        self.n_positions, self.strategy = self.n_positions or self.seq_len, tuple(self.strategy)
        super().__post_init__()


@dataclass
class Config(Run):
    """Every field is a flag. These may change when a run is resumed."""

    recipe: Literal[tuple(RECIPES)] = "tiny"  # which defaults to use: ours, or one of Table 4's
    data: str = "data/python-docs"  # folder that data.py has prepared
    out: str = ""  # folder of this run (default: out/RECIPE)
    max_steps: int = 125_000  # steps of the run; the learning-rate schedule depends on it
    grad_clip: float = 0.0  # gradient clipping: the largest norm; 0.0 is off
    micro_batch_size: int = 64  # rows that go through a process at once
    eval_every: int = 1000  # steps between evaluations
    save_every: int = 1000  # steps between checkpoints
    log_every: int = 50  # steps between lines of the log
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # precision
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to run
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto: on CUDA
    eval_only: bool = False  # evaluate the checkpoint in --out and export it, without training
    fill: str = None  # a text with <mask>s: only print the likeliest words there, by the run in --out


def presets(given):
    """Defaults that depend on the given flags: the recipe's, and with --init the shape of that encoder."""
    values = {"out": f"out/{given.get('recipe', 'tiny')}"} | RECIPES[given.get("recipe", "tiny")]
    if given.get("init"):
        shape = load_pretrained(given["init"])[0]
        for name in ("n_positions", "n_layer", "n_embd", "head_size", "norm"):
            values[name] = getattr(shape, name)
    return values


# One step


def lr_at(step, config):
    """Learning rate of step 0, 1, ...: linear warm-up from 0, then linear decay to 0."""
    warmup = round(config.warmup * config.max_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * (config.max_steps - step) / (config.max_steps - warmup)


def make_optimizer(model, config):
    """AdamW, with weight decay on matrices only, as in 24hBERT (fairseq decays everything)."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == wide] for wide in (True, False))
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def step_batch(data, config, step, device):
    """The corrupted rows of a step, of all processes. Each process makes them all, which costs little, and
    uses its own share, so the number of processes cannot matter."""
    k, *_ = counts(config.seq_len, config.mask_rate, config.strategy)
    rows = data.batch(step, config.batch_size, config.seq_len, k, config.seed)
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    generator = torch.Generator(device).manual_seed(seed_of(config.seed, 2, step))
    return corrupt(rows.to(device), config.mask_rate, config.strategy, vocab=data.vocab, generator=generator)


def backward(model, batch, config, step, machine, scaler):
    """Gradients of the batch's mean loss. This process does its share of the rows, in micro-batches;
    DistributedDataParallel averages the gradients. Returns this process's mean loss in nats, a tensor."""
    share, k = config.batch_size // machine.world, batch.predict.size(1)
    start, end, total = machine.rank * share, (machine.rank + 1) * share, 0.0
    for at in range(start, end, config.micro_batch_size):
        torch.manual_seed(seed_of(config.seed, 3, step, at))  # dropout
        stop = min(at + config.micro_batch_size, end)
        with nullcontext() if stop == end or machine.world == 1 else model.no_sync():
            with machine.autocast():
                loss = model(batch.rows(at, stop, machine.device)).sum() / (share * k)
            scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def update(optimizer, scaler, lr):
    """Take an optimizer step at a learning rate. fp16's scaler skips it where a gradient is infinite."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def train(parts, data, val, config, machine, first):
    """Steps from `first` to max_steps, or until a signal asks to stop. parts: model, optimizer and scaler;
    val: see validation_batches. Returns the last evaluation."""
    raw, optimizer, scaler = parts.values()
    model, signals = raw, catch_signals()
    if machine.world > 1:
        model = DistributedDataParallel(raw, gradient_as_bucket_view=True)
    if config.compile == "yes" or (config.compile == "auto" and machine.device.type == "cuda"):
        model.compile()  # in place, so that the parameters keep their names
    batch, since, start = step_batch(data, config, first, machine.device), first, time.perf_counter()
    bar = dict(total=config.max_steps, initial=first, disable=machine.rank > 0 or None)
    for step in tqdm(range(first, config.max_steps), "training", **bar):
        lr, done, last = lr_at(step, config), step + 1, step + 1 == config.max_steps
        loss = backward(model, batch, config, step, machine, scaler)
        batch = step_batch(data, config, done, machine.device)  # while the device is busy with this step
        scaler.unscale_(optimizer)
        norm = float(clip_grad_norm_(raw.parameters(), config.grad_clip or math.inf))
        loss, stop = machine.sum([float(loss) / machine.world, len(signals)])
        stop_if_diverged(loss, norm, scaler, step, lr)
        update(optimizer, scaler, lr)

        due = [done % n == 0 or last for n in (config.log_every, config.eval_every, config.save_every)]
        if due[0] or done == 1:
            entry = dict(step=done, loss=loss, lr=lr, grad_norm=norm if math.isfinite(norm) else None)
            seconds = (time.perf_counter() - start) / (done - since)
            log(entry | speed(seconds, config, machine), config, machine)
        if due[1]:
            entry = dict(step=done) | evaluate(raw, val, config, machine)
            log(entry, config, machine)
        if due[2] or stop:
            save_checkpoint(parts, data, config, machine, done)
        if any(due) or done == 1:
            since, start = done, time.perf_counter()
        if stop and not last:
            machine.say(f"stopped after step {done}; the same command resumes the run")
            sys.exit(128 + (signals or [signal.SIGTERM])[0])
    return entry


def stop_if_diverged(loss, norm, scaler, step, lr):
    """Fails before the optimizer moves, so that the last checkpoint is a good one. fp16's scaler skips a step
    with infinite gradients and lowers its scale; the run has diverged only where that does not help."""
    skipped = scaler.is_enabled() and scaler.get_scale() > 1e-4
    if not math.isfinite(loss) or not (math.isfinite(norm) or skipped):
        advice = f"resume with --grad_clip 1 (Table 4), or start again with --lr below {lr:.2e}"
        fail(f"step {step + 1}: loss {loss}, gradient norm {norm}: the run has diverged; {advice}")


def catch_signals():
    """A list that Ctrl-C and SIGTERM are added to, so that the loop can finish its step and save."""
    caught = []

    def handler(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nfinishing this step, then saving; the same signal again stops at once\n")

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return caught


def log(entry, config, machine):
    """Append a line to log.jsonl, and show it."""
    if machine.rank == 0:
        with open(Path(config.out) / "log.jsonl", "a") as f:
            f.write(json.dumps(entry) + "\n")
        machine.say(shown(entry))


def shown(entry):
    """The values of an entry of the log, but for those at the common masking rate, for people."""
    values = [(name, x) for name, x in entry.items() if x is not None and name[-3:] != "_15"]
    return "  ".join(f"{name} {x:,}" if isinstance(x, int) else f"{name} {x:.4g}" for name, x in values)


def validation_batches(data, config):
    """{suffix of the names in the log: Corrupted}: the same rows at the run's own masking rate and at 15%,
    with masks that are always the same, on every device."""
    n, batches = config.seq_len, {}
    indices = np.arange(min(config.eval_rows, data.n_rows("val", n)))
    for suffix, rate in {"": config.mask_rate, "_15": COMMON_RATE}.items():
        rows = torch.from_numpy(data.rows("val", indices, n, counts(n, rate, config.strategy)[0]))
        masks = torch.Generator().manual_seed(0)
        batches[suffix] = corrupt(rows, rate, config.strategy, vocab=data.vocab, generator=masks)
    return batches


@torch.no_grad()
def evaluate(model, batches, config, machine):
    """Validation losses in nats and perplexities, as an entry of the log. All processes share the work."""
    model.eval()
    entry, size = {}, config.micro_batch_size
    for suffix, batch in batches.items():
        total = torch.zeros(batch.predict.size(1), dtype=torch.float64)  # (k,)
        for at in range(machine.rank * size, len(batch.inputs), machine.world * size):
            with machine.autocast():
                total += model(batch.rows(at, at + size, machine.device)).sum(0).cpu()
        entry |= perplexities(torch.tensor(machine.sum(total)) / len(batch.inputs), batch, suffix)
    model.train()
    return entry


def perplexities(nats, batch, suffix=""):
    """Loss and perplexities of all tokens and of each kind; nats (k,): mean losses along batch.predict."""
    n_m, n_r, k = batch.masked.size(1), batch.n_replaced, len(nats)
    parts = (nats, *nats.split([n_m, n_r, k - n_m - n_r]))
    entry = {f"val_loss{suffix}": float(nats.mean())}
    for name, part in zip(("ppl", "ppl_masked", "ppl_replaced", "ppl_unchanged"), parts):
        entry[name + suffix] = math.exp(min(float(part.mean()), 700)) if len(part) else None
    return entry


@torch.no_grad()
def fill(out, text):
    """For each <mask> of a text, the five likeliest words by the run in `out`, as (word, probability)."""
    config = Config(**json.loads((Path(out) / "config.json").read_text()))
    model, state = MaskedLM(config).eval(), load_checkpoint(out)
    model.load_state_dict((state or fail(f"{out}: there is no checkpoint"))["model"])
    batch, tokenizer = masked_text(text, Path(config.data) / "tokenizer.json", config.n_positions)
    best = model.logits(batch)[0].softmax(-1).topk(5)  # (n_m, 5)
    words = [[tokenizer.decode([i]) for i in ids] for ids in best.indices.tolist()]
    return [list(zip(*x)) for x in zip(words, best.values.tolist())]


# Checkpoints


def identity(config, data):
    """What must not change when a run is resumed."""
    run = {f.name: str(getattr(config, f.name)) for f in fields(Run)}
    return run | {"data (SHA-256)": data.meta["sha256"]["train.bin"]}


def save_checkpoint(parts, data, config, machine, done):
    """Write ckpt.pt; the one before becomes ckpt.prev.pt. At any moment one of the two is complete."""
    if machine.rank == 0:
        out, state = Path(config.out), {name: part.state_dict() for name, part in parts.items()}
        state |= dict(step=done, run=identity(config, data), log_bytes=os.path.getsize(out / "log.jsonl"))
        with atomic(out / "ckpt.new.pt") as f:
            torch.save(state, f)
        if (out / "ckpt.pt").exists():
            os.replace(out / "ckpt.pt", out / "ckpt.prev.pt")
        os.replace(out / "ckpt.new.pt", out / "ckpt.pt")


def load_checkpoint(out):
    """The state in ckpt.pt, or in ckpt.prev.pt if that is damaged; None if there is no checkpoint."""
    paths = [path for path in (Path(out) / "ckpt.pt", Path(out) / "ckpt.prev.pt") if path.exists()]
    for path in paths:
        with suppress(Exception):
            if zipfile.ZipFile(path).testzip() is None:  # torch.load compares no checksums
                return torch.load(path, map_location="cpu", weights_only=True)
        print(f"warning: {path} is damaged", flush=True)
    if paths:
        fail(f"{' and '.join(map(str, paths))}: damaged; move them away to start from the beginning")


def resume(parts, data, config, machine):
    """Load the checkpoint of config.out, if there is one. Returns the number of steps that are done."""
    state, here = load_checkpoint(config.out), identity(config, data)
    for name, old in state["run"].items() if state else ():
        if here[name] != old:
            fail(f"{config.out}: has a run with {name} {old}, not {here[name]}; choose another --out")
    if machine.rank == 0 and not config.eval_only:  # what was logged after the checkpoint comes again
        with open(Path(config.out) / "log.jsonl", "ab") as f:
            f.truncate(min(f.tell(), state["log_bytes"]) if state else 0)
    if state is None:
        return 0
    for name, part in parts.items():
        if state[name]:  # the scaler's is empty without fp16
            part.load_state_dict(state[name])
    return state["step"]


# The machine

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
# FLOP/s of dense bf16 or fp16 products, by what a GPU's name contains
PEAKS = {"H100 80GB": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "V100": 125e12}


@dataclass
class Machine:
    """This process: its rank among world processes, its device, and the precision of its products."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def sum(self, values):
        """A list or vector of numbers, each summed over the processes; a list."""
        values = torch.as_tensor(values, dtype=torch.float64)
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.tolist()

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def this_machine(device, dtype):
    """The Machine for this process, by default with the accelerator that torch sees and its best dtype."""
    if platform.libc_ver()[0] == "glibc":
        # By default every large tensor is mapped and unmapped, which is half of a CPU's step:
        for parameter, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX: never map; M_TRIM_THRESHOLD: never trim
            ctypes.CDLL(None).mallopt(parameter, value)
    torch.set_float32_matmul_precision("high")
    auto = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    name = auto if device == "auto" else device
    if name not in (auto, "cpu"):
        fail(f"--device {name}: torch sees none here; use --device cpu")
    best = torch.float32
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        best = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    elif name == "cpu" and torch.cpu._is_avx512_bf16_supported():
        best = torch.bfloat16
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return Machine(rank, world, torch.device(name), DTYPES.get(dtype, best))


def speed(seconds, config, machine):
    """Tokens per second, and MFU: a step's FLOPs, 3 x forward, as a share of a known GPU's peak."""
    k, n_m, _ = counts(config.seq_len, config.mask_rate, config.strategy)
    work = 3 * config.batch_size * flops.forward(config, config.seq_len, n_m, k)
    gpu = torch.cuda.get_device_name() if machine.device.type == "cuda" else ""
    peak = next((peak for name, peak in PEAKS.items() if name in gpu), None)
    mfu = work / seconds / (peak * machine.world) if peak else None
    return dict(tokens_per_s=round(config.batch_size * config.seq_len / seconds), mfu=mfu)


# The command


def prepare_run(config, machine):
    """Data and model of a run. Makes the default corpus where there is none yet."""
    if config.seq_len > config.n_positions:
        fail(f"--seq_len {config.seq_len}: must be at most n_positions, {config.n_positions}")
    if config.batch_size % machine.world:
        fail(f"--batch_size {config.batch_size}: must be a multiple of {machine.world}, the processes")
    if config.data == Config.data and not (Path(config.data) / "meta.json").exists():
        if machine.rank == 0:
            machine.say(f"no data yet: preparing {config.data} from the docstrings of the installed Python")
            prepare_default_data([])
        if machine.world > 1:
            dist.barrier()
    data = Data(config.data)
    config.vocab_size = data.vocab.size
    torch.manual_seed(seed_of(config.seed, 4))
    model = MaskedLM(config)
    if config.init:
        try:
            model.encoder.load_state_dict(load_pretrained(config.init)[1].state_dict())
        except RuntimeError as e:
            advice = "prepare the data with its tokenizer.json, and give no flags for the encoder's shape"
            fail(f"--init {config.init}: {str(e).splitlines()[-1]}; {advice}")
    return data, model.to(machine.device)


@command
def main(argv):
    recipes = "\n".join(f"  {name}: {values or 'those below'}" for name, values in RECIPES.items())
    config = parse_flags(Config, argv, f"{__doc__}\nRecipes and their defaults:\n{recipes}", presets)
    if config.fill is not None:
        for words in fill(config.out, config.fill):
            print("  ".join(f"{word!r} {p:.1%}" for word, p in words))
        return
    machine, out = this_machine(config.device, config.dtype), Path(config.out)
    if machine.world > 1:
        dist.init_process_group("nccl" if machine.device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    with lock(out) if machine.rank == 0 else nullcontext():
        data, model = prepare_run(config, machine)
        scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype is torch.float16)
        parts = dict(model=model, optimizer=make_optimizer(model, config), scaler=scaler)
        first = resume(parts, data, config, machine)
        size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
        machine.say(f"{size} on {machine.world} x {machine.device}, {machine.dtype}; {first} steps are done")
        val = validation_batches(data, config)
        if config.eval_only or first >= config.max_steps:
            if first == 0:
                fail(f"--eval_only: there is no checkpoint in {out}")
            entry = dict(step=first) | evaluate(model, val, config, machine)
        else:
            if machine.rank == 0:
                write(out / "config.json", json.dumps(asdict(config), indent=1))
            entry = train(parts, data, val, config, machine, first)
        if machine.rank == 0:
            save_pretrained(model, out / "hf", Path(config.data) / "tokenizer.json")
            print(f"\nevaluation:          {shown(entry)}")
            nats = -torch.from_numpy(data.frequencies())[val[""].labels].log()  # (B, k)
            print(f"word frequency only: {shown(perplexities(nats.mean(0), val['']))}")
            print(f"{out}/hf is the encoder, for finetune.py and transformers; {out}/ckpt.pt has everything")


if __name__ == "__main__":
    main()
