"""Pre-train 3ML, or vanilla MLM for comparison, on the tokens that data.py has prepared.

    torchrun train.py                   minutes on two CPU cores; it prepares its own small corpus
    torchrun train.py --decoder none --mask_rate 0.15 --out out/vanilla     vanilla MLM, to compare
    torchrun --nproc_per_node 8 train.py --recipe efficient-large --data data/mine
    python train.py --out out/tiny --eval_only   evaluate a run's checkpoint and export it again
    python train.py --out out/tiny --fill "Return the <mask> of a list."    the likeliest words

The same command resumes a run, however it was interrupted: at most --save_every steps are done
again, and on a CPU it ends bit for bit as if undisturbed. A run leaves in --out ckpt.pt, log.jsonl,
config.json, tokenizer.json, and hf/ (the encoder, for finetune.py and transformers; vanilla MLM's
has its head). Rows and masks are a function of (seed, step, row), dropout of (seed, step, first row
of the micro-batch). So the number of processes changes only the order of sums; with dropout, if
--micro_batch_size divides each one's rows. `python train.py` works too. Models are not sharded."""

import argparse
import ctypes
import json
import math
import os
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import flops
from data import Data, command, count, fraction, load_tokenizer, make_parser, seed_of
from data import main as prepare_default_data
from model import DECODERS, Corrupted, MaskedLM, ModelConfig, UserError, atomic, corrupt, counts
from model import load_pretrained, reading, save_pretrained, write, write_json

RECIPES = {  # one for a first look, and Table 4's two (longer-base with 125K steps, as in Table 3)
    "tiny": dict(n_layer=3, n_embd=256, n_layer_dec=1, norm="pre", dropout=0.0, mask_rate=0.5,
                 seq_len=32, batch_size=32, max_steps=4500, lr=7e-4),
    "efficient-large": dict(n_layer=24, n_embd=1024, norm="pre", mask_rate=0.5, seq_len=128,
                            batch_size=4096, micro_batch_size=256, max_steps=23_000, lr=2e-3),
    "longer-base": dict(n_layer=12, n_embd=768, mask_rate=0.4, seq_len=512, batch_size=2048,
                        max_steps=125_000, lr=7e-4),
}  # fmt: skip
# Flags that may differ when a run is resumed; of --data, only the path, not what is in it.
MAY_DIFFER = (
    "recipe", "data", "out", "max_steps", "grad_clip", "micro_batch_size", "log_every",
    "eval_every", "save_every", "device", "dtype", "compile", "eval_only", "fill",
)  # fmt: skip


def parse_flags(argv):
    """The flags as a namespace. Defaults are the recipe's; the encoder's shape is that of --init;
    for --eval_only and --fill, all are those of the run in --out."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("run").add_argument
    add("--recipe", choices=RECIPES, default="tiny", help="what the other flags default to")
    add("--data", default="data/python-docs", help="folder that data.py has prepared")
    add("--out", help="folder of the run; default: out/RECIPE")
    add("--init", help="Hugging Face folder of a RoBERTa, to start from its encoder")
    add("--seed", type=int, default=0, help="seed of initialization, rows, masks and dropout")
    add("--eval_only", action="store_true", help="evaluate and export the checkpoint in --out")
    add("--fill", metavar="TEXT", help="print the likeliest words for each <mask> of a text")
    add = parser.add_argument_group("model").add_argument
    add("--decoder", choices=DECODERS, default="self", help="3ML's decoder; none is vanilla MLM")
    add("--n_layer", type=count, help="layers of the encoder")
    add("--n_embd", type=count, help="width of the encoder")
    add("--head_size", type=count, default=64, help="size of an attention head")
    add("--n_layer_dec", type=count, default=2, help="layers of the decoder")
    add("--n_embd_dec", type=count, help="width of the decoder; None: half of n_embd")
    add("--norm", choices=("post", "pre"), help="LayerNorm; None: pre for cross, else post")
    add("--dropout", type=fraction, default=0.1, help="of hidden states and attention weights")
    add("--n_positions", type=count, help="longest row the model can take; None: seq_len")
    add = parser.add_argument_group("training").add_argument
    add("--mask_rate", type=fraction, help="share of a row's tokens to predict")
    add("--strategy", type=fraction, nargs=3, default=[0.8, 0.1, 0.1],
        help="shares of [MASK], random and unchanged tokens among these")  # fmt: skip
    add("--seq_len", type=count, help="tokens of a row, <s> and </s> included")
    add("--batch_size", type=count, help="rows of a step, over all processes and micro-batches")
    add("--micro_batch_size", type=count, default=64, help="rows that go through a process at once")
    add("--max_steps", type=count, help="steps of the run, and of its learning-rate schedule")
    add("--lr", type=fraction, help="peak learning rate")
    add("--warmup", type=fraction, default=0.06, help="share of the steps with a rising rate")
    add("--weight_decay", type=fraction, default=0.01, help="AdamW's, on matrices only")
    add("--grad_clip", type=float, default=0.0, help="largest norm of the gradient; 0 is off")
    add = parser.add_argument_group("watching and saving").add_argument
    add("--log_every", type=count, default=50, help="steps between lines of the log")
    add("--eval_every", type=count, default=500, help="steps between evaluations")
    add("--save_every", type=count, default=500, help="steps between checkpoints")
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="where to run")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="precision of products")
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="torch.compile the training step")  # fmt: skip

    # The defaults depend on --recipe, --init, --out, --eval_only and --fill, which are read first.
    given, _ = parser.parse_known_args([x for x in argv if x not in ("-h", "--help")])
    defaults = RECIPES[given.recipe] | dict(out=f"out/{given.recipe}")
    if given.init:
        shape, _ = load_pretrained(given.init)
        for name in ("n_positions", "n_layer", "n_embd", "head_size", "norm"):
            defaults[name] = getattr(shape, name)
    if given.eval_only or given.fill is not None:
        path = Path(given.out or defaults["out"], "config.json")
        with reading(path, "--out must name the folder of a run"):
            defaults |= json.loads(path.read_bytes())
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.n_positions = args.n_positions or args.seq_len
    return args


# ---- One step ----
def lr_at(step, lr, warmup, max_steps):
    """Learning rate of step 0, 1, ...: up to lr for the share `warmup`, then linearly to 0."""
    rising = round(warmup * max_steps)
    if step < rising:
        return lr * (step + 1) / rising
    return lr * (max_steps - step) / (max_steps - rising)


def make_optimizer(model, weight_decay):
    """AdamW, with weight decay on matrices only, as in 24hBERT (fairseq decays everything)."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, weight_decay=0, fused=True)


def corrupt_rows(rows, rate, args, data, seed):
    """Rows (B, n), corrupted by the run's strategy with a generator of this seed."""
    generator = torch.Generator(rows.device).manual_seed(seed)
    ids = dict(vocab_size=data.vocab_size, mask_id=data.mask_id)
    return corrupt(rows, rate, args.strategy, generator=generator, **ids)


def step_batch(data, args, step, device):
    """The corrupted rows of a step, of all processes: each makes them all and uses its share."""
    rows = data.batch(step, args.batch_size, args.seq_len, args.seed).to(device)
    return corrupt_rows(rows, args.mask_rate, args, data, seed_of(args.seed, 2, step))


def rows_of(batch, start, stop, device):
    """Rows start to stop of a Corrupted, on a device."""
    return Corrupted(*(x[start:stop].to(device) for x in batch[:-1]), batch.n_replaced)


def backward(model, batch, args, step, machine, scaler):
    """Gradients of the batch's mean loss. This process does its part of the rows in micro-batches,
    and DDP averages over processes. Returns its part's mean loss in nats."""
    rows, k = args.batch_size // machine.world, batch.predict.size(1)  # rows of this process
    start, end, total = machine.rank * rows, (machine.rank + 1) * rows, 0.0
    for at in range(start, end, args.micro_batch_size):
        torch.manual_seed(seed_of(args.seed, 3, step, at))  # dropout
        stop = min(at + args.micro_batch_size, end)
        model.require_backward_grad_sync = stop == end  # DDP averages after the last micro-batch
        with machine.autocast():
            loss = model(rows_of(batch, at, stop, machine.device)).sum() / (rows * k)
        scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def update(model, optimizer, scaler, lr, grad_clip=0.0):
    """Take an optimizer step, which fp16's scaler leaves out if a gradient is infinite. Returns the
    norm of the gradient before clipping, a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)
    norm = clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


# ---- The run ----
def train(model, optimizer, scaler, data, args, machine, settings, first, last):
    """The steps from `first` up to `last`. settings: see save_checkpoint."""
    wrapped = torch.compile(model) if args.compile else model  # evaluation takes `model` itself
    if machine.world > 1:
        wrapped = DistributedDataParallel(wrapped)
    batch, seconds, logged = step_batch(data, args, first, machine.device), 0.0, first
    bar = tqdm(total=last, initial=first, desc="training", disable=machine.rank > 0 or None)
    for step in range(first, last):
        began, done = time.perf_counter(), step + 1
        loss = backward(wrapped, batch, args, step, machine, scaler)
        batch = step_batch(data, args, done, machine.device)  # while a GPU is busy with this step
        lr = lr_at(step, args.lr, args.warmup, args.max_steps)
        norm = update(model, optimizer, scaler, lr, args.grad_clip)
        log = done % args.log_every == 0 or done in (1, last)
        save = done % args.save_every == 0 or done == last
        if log or save:  # only here is the device waited for, and nothing unsound is saved
            loss, norm = machine.sum(loss / machine.world).item(), float(norm)
            if not math.isfinite(loss + (0 if scaler.is_enabled() else norm)):
                advice = "resume with --grad_clip 1 (Table 4), or start again with a lower --lr"
                raise UserError(f"step {done}: diverged, loss {loss}, gradient {norm}; {advice}")
        bar.update()
        seconds += time.perf_counter() - began
        if log:
            entry = dict(step=done, loss=loss, lr=lr, grad_norm=norm)
            entry |= speed(seconds / (done - logged), model.config, args, machine)
            write_log(entry, args, machine)
            seconds, logged = 0.0, done
        if done % args.eval_every == 0 and done < last:
            write_log(dict(step=done) | evaluate(model, data, args, machine), args, machine)
        if save and machine.rank == 0:
            save_checkpoint(args.out, done, settings, model, optimizer, scaler)
    bar.close()


def speed(seconds, config, args, machine):
    """Tokens per second, and MFU, the share of the GPUs' peak that 3 x forward FLOPs are; None if
    the peak, or a formula for the decoder, is unknown."""
    k, n_m, _ = counts(args.seq_len, args.mask_rate, args.strategy)
    forward, rows = flops.forward(config, args.seq_len, n_m, k), args.batch_size / seconds
    mfu = 3 * forward * rows / machine.peak / machine.world if machine.peak and forward else None
    return dict(tokens_per_s=round(args.seq_len * rows), mfu=mfu)


def write_log(entry, args, machine):
    """Append an entry to log.jsonl, and print it."""
    if machine.rank == 0:
        with open(Path(args.out, "log.jsonl"), "a") as f:
            f.write(json.dumps(entry) + "\n")
        machine.say("  ".join(f"{name} {x:,.6g}" for name, x in entry.items() if x is not None))


@torch.no_grad()
def evaluate(model, data, args, machine):
    """Validation losses in nats, and perplexities of all tokens and of each kind, as an entry of
    the log: at the run's own masking rate, and at 15% ("_15"), since different rates do not
    compare. The first 1,024 rows, with masks of a fixed seed drawn on the CPU, are the same for all
    runs and devices. All processes share the work."""
    model.eval()
    first = range(min(1024, data.n_rows("val", args.seq_len)))
    rows, entry, size = data.rows("val", first, args.seq_len), {}, args.micro_batch_size
    for suffix, rate in {"": args.mask_rate, "_15": 0.15}.items():
        batch = corrupt_rows(rows, rate, args, data, seed=0)
        nats = torch.zeros(batch.predict.size(1), dtype=torch.float64)  # (k,)
        for at in range(machine.rank * size, len(rows), machine.world * size):
            with machine.autocast():
                nats += model(rows_of(batch, at, at + size, machine.device)).sum(0).cpu()
        nats = machine.sum(nats) / len(rows)
        entry[f"val_loss{suffix}"], n_m = nats.mean().item(), batch.masked.size(1)
        parts = nats, *nats.tensor_split([n_m, n_m + batch.n_replaced])
        for kind, part in zip(("", "_masked", "_replaced", "_unchanged"), parts):
            entry[f"ppl{kind}{suffix}"] = part.mean().exp().item() if len(part) else None
    model.train()
    return entry


@torch.no_grad()
def fill(args):
    """Print the five likeliest words for each <mask> of a text, by the run in --out."""
    state = load_checkpoint(args.out)["model"]
    model = make_model(args).eval()
    model.load_state_dict(state)
    tokenizer, _ = load_tokenizer(Path(args.out, "tokenizer.json"))
    tokenizer.encode_special_tokens = False  # here "<mask>" is not plain text
    tokens = torch.tensor([tokenizer.encode(args.fill).ids])  # (1, n)
    is_mask = tokens[0] == tokenizer.token_to_id("<mask>")
    kept, masked = (~is_mask).nonzero().T, is_mask.nonzero().T  # (1, n_en), (1, n_m)
    if not masked.numel() or tokens.numel() > args.n_positions:
        raise UserError(f"--fill: give one <mask> or more, in at most {args.n_positions} tokens")
    batch = Corrupted(tokens, kept, masked, predict=masked, labels=masked, n_replaced=0)
    for p in model.logits(batch)[0].softmax(-1):  # (V,)
        print("  ".join(f"{tokenizer.decode([i])!r} {p[i]:.1%}" for i in p.topk(5).indices))


def save_checkpoint(out, done, settings, model, optimizer, scaler):
    """Write ckpt.pt: whole, or the one before remains. settings: what makes the run this one."""
    state = dict(
        step=done, settings=settings, model=model.state_dict(), optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict())  # fmt: skip
    with atomic(Path(out, "ckpt.pt")) as f:
        torch.save(state, f)


def load_checkpoint(out):
    """The dict in ckpt.pt. Raises UserError if it is missing or broken."""
    path = Path(out, "ckpt.pt")
    with reading(path, "move it away to start from the beginning"):
        return torch.load(path, map_location="cpu", weights_only=True)


def resume(out, settings, model, optimizer, scaler):
    """Load the checkpoint of a run, if there is one. Returns the number of steps that are done."""
    if not Path(out, "ckpt.pt").exists():
        return 0
    state = load_checkpoint(out)
    old = state.get("settings", {})  # another program's file has none
    for name in settings | old:
        if settings.get(name) != old.get(name):
            what = f"its run has {name} {old.get(name)}, not {settings.get(name)}"
            raise UserError(f"{out}: {what}; give its flags and data, or choose another --out")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty without fp16
        scaler.load_state_dict(state["scaler"])
    return state["step"]


# ---- The machine ----
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# FLOP/s of dense bf16 products, by torch.cuda.get_device_name()
PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}


class Machine:
    """This process: its rank among `world` processes, its device, the dtype of its products (the
    fastest that it has), and the peak of its GPU in FLOP/s, or None. Raises UserError."""

    def __init__(self, device="auto", dtype="auto"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, best, self.peak = torch.device("cpu"), torch.float32, None
        if device != "cpu" and torch.accelerator.is_available():
            self.device = torch.accelerator.current_accelerator()
        if device not in ("auto", self.device.type):
            raise UserError(f"--device {device}: torch sees none here; use --device cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            self.peak = PEAKS.get(torch.cuda.get_device_name())
            best = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
        elif self.device.type == "cpu":
            # For short rows SDPA's plain products are faster; CPUs heed this flag too.
            torch.backends.cuda.enable_flash_sdp(False)
            if sys.platform == "linux":  # glibc is not to map and unmap every large tensor
                ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
                ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
            best = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else best
        self.dtype = DTYPES.get(dtype, best)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def scaler(self):
        """fp16's gradients are scaled; for other dtypes, this does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def sum(self, x):
        """A tensor, summed over the processes; on the CPU."""
        if self.world > 1:
            x = x.to(self.device)
            dist.all_reduce(x)
        return x.cpu()

    def say(self, text):
        """Print a line above the progress bar, in the first process."""
        if self.rank == 0:
            tqdm.write(text)


def make_model(args):
    """The MaskedLM of the flags, as it starts."""
    torch.manual_seed(seed_of(args.seed, 4))
    model = MaskedLM(ModelConfig(**{f.name: getattr(args, f.name) for f in fields(ModelConfig)}))
    if args.init and not Path(args.out, "ckpt.pt").exists():
        advice = "prepare the data with its tokenizer.json, and give no flags of its shape"
        with reading(f"--init {args.init}", advice):
            model.encoder.load_state_dict(load_pretrained(args.init)[1].state_dict())
    return model


def open_data(args, machine):
    """The folder --data. Prepares the default one if there is none yet."""
    missing = not Path(args.data, "meta.json").exists()
    if missing and args.data == "data/python-docs" and machine.rank == 0:
        prepare_default_data([])
    if machine.world > 1:
        dist.barrier()  # the others wait for the first process
    return Data(args.data)


def run(args, machine):
    """Start or resume a run, train, evaluate, export."""
    if args.seq_len > args.n_positions:
        raise UserError(f"--seq_len {args.seq_len}: longer than n_positions, {args.n_positions}")
    if args.batch_size % machine.world:
        raise UserError(f"--batch_size {args.batch_size}: no multiple of {machine.world} processes")
    if args.compile:
        machine.say("compiling the model; this needs a C compiler, --no-compile does not")
    data, out = open_data(args, machine), Path(args.out)
    data.n_rows("val", args.seq_len)  # where there is no row, fail now and not after hours
    args.vocab_size = data.vocab_size
    model = make_model(args).to(machine.device)
    optimizer = make_optimizer(model, args.weight_decay)
    scaler = machine.scaler()
    settings = {name: x for name, x in vars(args).items() if name not in MAY_DIFFER}
    settings["data"] = data.meta
    first = resume(out, settings, model, optimizer, scaler)
    if args.eval_only and first == 0:  # its hf/ may still be there, and must stay
        raise UserError(f"--eval_only: there is no ckpt.pt in {out}")
    last = first if args.eval_only else max(first, args.max_steps)
    if machine.world > 1:
        everywhere = [None] * machine.world
        dist.all_gather_object(everywhere, (first, settings))
        if everywhere.count((first, settings)) < machine.world:
            dist.barrier()
            raise UserError("--data and --out differ between processes; they must share a disk")
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    machine.say(f"{size} on {machine.world} x {machine.device}, {machine.dtype}; at step {first:,}")
    if machine.rank == 0 and not args.eval_only:
        write_json(out / "config.json", vars(args))
        write(out / "tokenizer.json", (data.directory / "tokenizer.json").read_bytes())
    train(model, optimizer, scaler, data, args, machine, settings, first, last)
    write_log(dict(step=last) | evaluate(model, data, args, machine), args, machine)
    if machine.rank == 0:
        save_pretrained(model, out / "hf", out / "tokenizer.json")
        machine.say(f"{out}/hf: the encoder, for finetune.py and transformers")


@command
def main(argv):
    args = parse_flags(argv)
    if args.fill is not None:
        return fill(args)
    machine = Machine(args.device, args.dtype)
    if machine.world > 1:
        dist.init_process_group("nccl" if machine.device.type == "cuda" else "gloo")
    run(args, machine)
    if machine.world > 1:
        dist.barrier()  # a process that ends while others still talk to it can make them abort
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
