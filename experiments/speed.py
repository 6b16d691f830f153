"""Times a training step, side by side with transformers, with vanilla MLM and with other versions.

    python experiments/speed.py                   base shape: transformers, vanilla, self, cross
    python experiments/speed.py --shape tiny --only vanilla-15 self-50 "self-50 flash"
    python experiments/speed.py --against DIR --only self-50 "self-50 old" --rounds 11
    python experiments/speed.py --device cuda --shape large --batch 1024 --micro 256 --compile

A name is a decoder and a masking rate in percent, perhaps with a variant: `old` is the checkout in
--against (its own speed.py); without one of train.Machine's settings for CPUs are `flash` (SDPA's
flash kernel) and `malloc` (glibc's usual allocator). Each contender has a process of its own; on a
CPU they take turns, one step each: A B C A B C. Ratios are medians over the rounds. A step is
train.py's: rows, corruption, forward, backward, gradient norm, optimizer. FLOPs are 3 x
flops.forward, for transformers too, although it computes the logits of every position."""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flops  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from data import Data  # noqa: E402

SHAPES = {
    "tiny": "--recipe tiny",
    "base": "--recipe longer-base --norm post --seq_len 128",
    "base-no-dropout": "--recipe longer-base --norm post --seq_len 128 --dropout 0",
    "large": "--recipe efficient-large",
}
DECODERS = {"hf": "none", "vanilla": "none", "self": "self", "cross": "cross"}
NAMES = ("hf-15", "vanilla-15", "self-50", "self-40", "cross-40")


class RandomTokens(Data):
    """Data without a folder."""

    def __init__(self, vocab_size):
        self.vocab_size, self.mask_id = vocab_size, vocab_size - 1
        tokens = np.random.default_rng(0).integers(4, self.mask_id, 1 << 22, np.uint16)
        self.tokens = {"train": tokens}


class HuggingFace(torch.nn.Module):
    """transformers' RobertaForMaskedLM with MaskedLM's interface."""

    def __init__(self, config):
        super().__init__()
        from transformers import AutoConfig, AutoModelForMaskedLM

        config = AutoConfig.for_model(**model.hf_config(config))
        self.net = AutoModelForMaskedLM.from_config(config)

    def forward(self, batch):
        labels = torch.full_like(batch.inputs, -100).scatter(1, batch.predict, batch.labels)
        return self.net(input_ids=batch.inputs, labels=labels).loss * batch.labels.numel()


class Contender:
    """A model with its optimizer and data. name: such as "self-50", with a variant behind a
    space."""

    def __init__(self, name, batch, micro=None, shape="base", device="cpu", compile=False):
        name, _, variant = name.partition(" ")
        kind, percent = name.split("-")
        flags = f"{SHAPES[shape]} --batch_size {batch} --micro_batch_size {micro or batch}"
        flags += f" --decoder {DECODERS[kind]} --mask_rate {int(percent) / 100}"
        self.args, self.done = train.parse_flags(flags.split()), 0
        self.args.vocab_size = 2048 if shape == "tiny" else 50265
        self.data = RandomTokens(self.args.vocab_size)
        with mock.patch("sys.platform", "any" if variant == "malloc" else sys.platform):
            self.machine = train.Machine(device)
        if variant == "flash":
            torch.backends.cuda.enable_flash_sdp(True)
        net = train.make_model(self.args)
        config = net.config
        self.model = HuggingFace(config) if kind == "hf" else net
        self.model.to(self.machine.device).train()
        self.wrapped = torch.compile(self.model) if compile else self.model
        self.optimizer = train.make_optimizer(self.model, 0.01)
        n = self.args.seq_len
        k, n_m, _ = model.counts(n, self.args.mask_rate)
        self.flops = 3 * batch * flops.forward(config, n, n_m, k)

    def now(self):
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self):
        """Take one step. Returns its seconds and FLOPs, and the peak memory."""
        start, scaler = self.now(), self.machine.scaler()
        batch = train.step_batch(self.data, self.args, self.done, self.machine.device)
        loss = train.backward(self.wrapped, batch, self.args, self.done, self.machine, scaler)
        norm = train.update(self.model, self.optimizer, scaler, 1e-4)
        assert torch.isfinite(loss + norm)
        self.done += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.machine.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        return dict(seconds=self.now() - start, bytes=peak, flops=self.flops)


def start_worker(name, args):
    """A process with a Contender, which takes a step for each line that it reads."""
    settings = {key: getattr(args, key) for key in ("batch", "micro", "shape", "device", "compile")}
    root = args.against if name.endswith(" old") else ROOT
    settings = json.dumps(settings | dict(name=name.removesuffix(" old")))
    command = [sys.executable, f"{root}/experiments/speed.py", "worker", settings]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def measure(args):
    """{name: [what each step returned]}, without those of the warm-up."""
    results = {name: [] for name in args.only}
    for together in [[name] for name in args.only] if args.device == "cuda" else [args.only]:
        workers = {name: start_worker(name, args) for name in together}
        for _ in range(args.warmup + args.rounds):
            for name, worker in workers.items():
                print("step", file=worker.stdin, flush=True)
                results[name].append(json.loads(worker.stdout.readline()))
        for worker in workers.values():
            worker.communicate()
    return {name: steps[args.warmup :] for name, steps in results.items()}


def main():
    if sys.argv[1:2] == ["worker"]:
        contender = Contender(**json.loads(sys.argv[2]))
        for _ in sys.stdin:
            print(json.dumps(contender.step()), flush=True)
        return
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step (default: 16)")
    parser.add_argument("--micro", type=int, help="rows of a micro-batch (default: the batch)")
    parser.add_argument("--rounds", type=int, default=11, help="measured steps (default: 11)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before those (default: 4)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")
    parser.add_argument(
        "--only", nargs="+", default=NAMES, metavar="NAME", help=f"default: {NAMES}"
    )
    parser.add_argument("--against", help="folder of another checkout, for names that end in old")
    args = parser.parse_args()
    results = measure(args)
    print(f"{args.shape}, batch {args.batch}, {args.device}, compile {args.compile}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'':<20}{'s/step':>8}{'least':>8}{'most':>8}{'TFLOP/s':>9}{'GB':>7}")
    for name, steps in results.items():
        seconds = [step["seconds"] for step in steps]
        rate, size = steps[0]["flops"] / median(seconds) / 1e12, steps[-1]["bytes"] / 1e9
        print(f"{name:<20}{median(seconds):>8.3f}{min(seconds):>8.3f}{max(seconds):>8.3f}"
              f"{rate:>9.3f}{size:>7.2f}")  # fmt: skip
    first, *others = results
    for name in others:
        pairs = zip(results[first], results[name])
        clock = median(a["seconds"] / b["seconds"] for a, b in pairs)
        print(f"{first} / {name}: clock {clock:.3f}, "
              f"FLOPs {results[first][0]['flops'] / results[name][0]['flops']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
