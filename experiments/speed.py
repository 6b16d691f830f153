"""Measures the speed of 3ML, of vanilla MLM in the same code, and of transformers' RoBERTa.

    python experiments/speed.py                     seconds per step of all models: base, n 128, batch 16
    python experiments/speed.py steps --shape large --batch 8 --rounds 4 --only vanilla-15 self-50
    python experiments/speed.py steps --device cuda --shape large --batch 1024 --micro 256 --compile
    python experiments/speed.py tricks              self-50 without each of its CPU optimizations
    python experiments/speed.py old --against DIR   this checkout against the one in DIR (its own speed.py)
    python experiments/speed.py data --text 'corpus/*.txt'    data.py against the tokenizer alone
    python experiments/speed.py start --text 'corpus/*.txt'   seconds from the command to the first step

A name such as self-50 is a decoder and a masking rate in percent. Each contender runs in a process of its
own. On a CPU the processes take turns, one step each: A B C A B C ... On a GPU they run one after another.
Ratios are medians over the rounds. A step is the same as in train.py: rows, corruption, forward, backward,
gradient norm, optimizer. `hf-15 default` is transformers without changes, under the same autocast and
optimizer; `hf-15` also has train.py's allocator settings and --compile. FLOPs are 3 x flops.forward, for
transformers too, although it computes the logits of every position.
"""

import argparse
import glob
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
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
from data import Data, Vocab, counts, load_tokenizer  # noqa: E402

SHAPES = {
    "base": dict(n_layer=12, n_embd=768, norm="post", seq_len=128),
    "large": dict(n_layer=24, n_embd=1024, norm="pre", seq_len=128),
}
DECODERS = {"hf": "none", "vanilla": "none", "self": "self", "cross": "cross"}
# The contenders of a group are in memory side by side, in less than 24 GB. vanilla-15 is the reference.
GROUPS = {
    "steps": ["hf-15 default,hf-15,vanilla-15,self-50", "vanilla-15,vanilla-40,self-40,cross-40"],
    "large": ["vanilla-15,self-50", "vanilla-15,self-40", "vanilla-15,cross-40"],
    "tricks": ["self-50,self-50 own malloc,self-50 nn.Dropout"],
    "old": ["self-50,self-50 old,vanilla-15,vanilla-15 old"],
}


class RandomTokens(Data):
    """Data without a folder: random words of RoBERTa's vocabulary."""

    def __init__(self):
        self.vocab = Vocab(50265)
        self.tokens = {"train": np.random.default_rng(0).integers(4, self.vocab.mask, 1 << 22, np.uint16)}


class HuggingFace(torch.nn.Module):
    """transformers' RobertaForMaskedLM with MaskedLM's interface."""

    def __init__(self, config):
        super().__init__()
        from transformers import AutoConfig, AutoModelForMaskedLM

        self.net = AutoModelForMaskedLM.from_config(AutoConfig.for_model(**model.hf_config(config)))

    def forward(self, batch):
        labels = torch.full_like(batch.inputs, -100).scatter(1, batch.predict, batch.labels)
        return self.net(input_ids=batch.inputs, labels=labels).loss * batch.labels.numel()


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Contender:
    """A model with its optimizer and its data. name: such as "self-50", with a variant behind a space."""

    def __init__(self, name, batch, micro=None, shape="base", device="cpu", compile=False):
        name, _, variant = name.partition(" ")
        kind, percent = name.split("-")
        if variant == "nn.Dropout":
            model.Dropout = torch.nn.Dropout
        rows = dict(batch_size=batch, micro_batch_size=micro or batch)
        config = train.Config(**SHAPES[shape], **rows, decoder=DECODERS[kind], mask_rate=int(percent) / 100)
        self.config, self.data, self.done = config, RandomTokens(), 0
        config.vocab_size = self.data.vocab.size
        # this_machine sets the allocator options of glibc, and no others
        libc = ("", "") if variant in ("default", "own malloc") else platform.libc_ver()
        with mock.patch("platform.libc_ver", return_value=libc):
            self.machine = train.this_machine(device, "auto")
        torch.manual_seed(0)
        self.model = HuggingFace(config) if kind == "hf" else model.MaskedLM(config)
        self.model.to(self.machine.device).train()
        self.optimizer = train.make_optimizer(self.model, config)
        if compile and variant != "default":
            self.model.compile()
        k, n_m, _ = counts(config.seq_len, config.mask_rate, config.strategy)
        self.flops = 3 * batch * flops.forward(config, config.seq_len, n_m, k)

    def step(self):
        """Take one step. Returns its seconds and those of its parts, its FLOPs, and the peak memory."""
        device = self.machine.device
        start, scaler = now(device), torch.amp.GradScaler(enabled=False)
        batch = train.step_batch(self.data, self.config, self.done, device)
        data = now(device) - start
        loss = train.backward(self.model, batch, self.config, self.done, self.machine, scaler)
        middle = now(device)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        assert torch.isfinite(loss + norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        times = dict(seconds=now(device) - start, data=data, optimizer=now(device) - middle)
        self.done += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        return times | dict(bytes=peak, flops=self.flops)


def start_worker(name, args):
    """A process with a Contender, which takes a step for each line that it reads."""
    settings = {key: getattr(args, key) for key in ("batch", "micro", "shape", "device", "compile")}
    root = args.against if name.endswith(" old") else ROOT
    settings = json.dumps(settings | dict(name=name.removesuffix(" old")))
    command = [sys.executable, f"{root}/experiments/speed.py", "worker", settings]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def product_rate(device, size):
    """FLOP/s of a square matrix product in the data type of the steps, the best of several."""
    machine, seconds = train.this_machine(device, "auto"), []
    a, b = (torch.randn(size, size, dtype=machine.dtype, device=machine.device) for _ in range(2))
    for _ in range(8):
        start = now(machine.device)
        a @ b
        seconds.append(now(machine.device) - start)
    return 2 * size**3 / min(seconds)


def measure(names, args):
    """Prints a table. Returns {name: [what each step returned]}."""
    results, rate, n = {name: [] for name in names}, 0, SHAPES[args.shape]["seq_len"]
    for together in [[name] for name in names] if args.device == "cuda" else [names]:
        workers = {name: start_worker(name, args) for name in together}
        for i in range(args.warmup + args.rounds):
            rate = max(rate, product_rate(args.device, 8192 if args.device == "cuda" else 2048))
            for name, worker in workers.items():
                print("step", file=worker.stdin, flush=True)
                line = worker.stdout.readline() or sys.exit(f"{name} failed; if memory is short, see --only")
                results[name].append(json.loads(line))
            seconds = [f"{x[-1]['seconds']:.3f}" for x in results.values() if x]
            print(f"round {i + 1}", *seconds, file=sys.stderr)
        for worker in workers.values():
            worker.communicate()
    results = {name: answers[args.warmup :] for name, answers in results.items()}
    print(
        f"{args.shape}, n {n}, batch {args.batch}, micro-batch {args.micro or args.batch}, {args.device}, "
        f"compile {args.compile}, torch {torch.__version__}; matrix products at {rate / 1e12:.3f} TFLOP/s"
    )
    columns = ("tokens/s", "s/step", "least", "most", "TFLOP/s", "of rate", "GB", "data", "norm, AdamW")
    print(("{:<20}{:>9}{:>8}{:>8}{:>8}{:>9}{:>9}{:>7}{:>7}{:>13}").format("", *columns))
    for name, x in results.items():
        seconds, data, optimizer = ([s[key] for s in x] for key in ("seconds", "data", "optimizer"))
        middle, speed = median(seconds), x[0]["flops"] / median(seconds)
        print(
            f"{name:<20}{args.batch * n / middle:>9,.0f}{middle:>8.3f}{min(seconds):>8.3f}"
            f"{max(seconds):>8.3f}{speed / 1e12:>9.3f}{speed / rate:>9.1%}{x[-1]['bytes'] / 1e9:>7.2f}"
            f"{median(data) / middle:>7.2%}{median(optimizer) / middle:>13.1%}"
        )
    return results


def steps(args):
    """The tables of steps, tricks and old, with ratios by the clock and by FLOPs."""
    key, measured = "large" if args.mode == "steps" and args.shape == "large" else args.mode, []
    for group in [",".join(args.only)] if args.only else GROUPS[key]:
        results = measure(group.split(","), args)
        clock = {name: np.array([step["seconds"] for step in x]) for name, x in results.items()}
        for name, x in results.items():
            new = name.removesuffix(" old")
            if name != new:
                print(f"{new}, new / old: clock {median(clock[new] / clock[name]):.3f}")
            elif "self-50" in results and (" " in name or name.startswith("hf")):
                print(f"{name} / self-50: clock {median(clock[name] / clock['self-50']):.3f}")
            elif "vanilla-15" in results and name.startswith(("self", "cross")):
                counted = results["vanilla-15"][0]["flops"] / x[0]["flops"]
                ratio = median(clock["vanilla-15"] / clock[name])
                over = f"clock over FLOPs {ratio / counted:.3f}"
                print(f"vanilla-15 / {name}: clock {ratio:.3f}, FLOPs {counted:.3f}; {over}")
        measured.append(results)
    return measured


def timed(command):
    """(seconds, peak bytes) of a Python command, which must succeed."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            peak = max(peak, int(line.split()[1]) * 1024 if line.startswith("VmHWM") else 0)
        time.sleep(0.1)
    assert process.returncode == 0, command
    return time.perf_counter() - start, peak


def data(args):
    """data.py with a given tokenizer, against encode_batch_fast on the same text in memory."""
    text = "\n\n".join(Path(path).read_text(errors="ignore") for path in sorted(glob.glob(args.text)))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        sample, bpe = Path(folder) / "sample.txt", f"{folder}/bpe/tokenizer.json"
        prepare = [f"{ROOT}/data.py", "--input", str(sample), "--out"]
        sample.write_text(text[: 20 << 20])
        timed([*prepare, f"{folder}/bpe"])
        tokenizer, _ = load_tokenizer(bpe)
        documents = text[: 64 << 20].split("\n\n")
        start = time.perf_counter()
        for i in range(0, len(documents), 4096):
            tokenizer.encode_batch_fast(documents[i : i + 4096], add_special_tokens=False)
        speed = len("".join(documents).encode()) / (time.perf_counter() - start) / 1e6
        print(f"tokenizers' encode_batch_fast: {speed:.2f} MB/s on {os.cpu_count()} cores", flush=True)
        for size in (100, 1000):
            with open(sample, "w") as f:
                f.writelines([text[: 50 * 10**6]] * (size // 50))
            seconds, peak = results[size] = timed([*prepare, f"{folder}/{size}", "--tokenizer", bpe])
            speeds = f"{sample.stat().st_size / 1e6 / seconds:.2f} MB/s, peak memory {peak / 1e6:.0f} MB"
            print(f"data.py, {size} million characters: {speeds}", flush=True)
    return results | dict(encode_batch_fast=speed)


def start(args):
    """Seconds from `python train.py`, base shape, to its line about the model and to its first step's."""
    measured = {"parameters on": [], "step 1 ": []}
    with tempfile.TemporaryDirectory() as folder:
        timed([f"{ROOT}/data.py", "--input", args.text, "--out", f"{folder}/data"])
        command = f"{ROOT}/train.py --recipe longer-base --seq_len 128 --batch_size 16 --max_steps 1 "
        command += f"--eval_rows 16 --device cpu --data {folder}/data --out {folder}/out"
        for i in range(3):
            began, run = time.perf_counter(), [sys.executable, *f"{command}{i}".split()]
            for line in subprocess.Popen(run, stdout=subprocess.PIPE, text=True).stdout:
                for words, seconds in measured.items():
                    if words in line and len(seconds) == i:
                        seconds.append(time.perf_counter() - began)
    model, first = map(median, measured.values())
    print(f"to the line about the model: {model:.1f} s; to the end of the first step: {first:.1f} s")
    return measured


def main():
    if sys.argv[1:2] == ["worker"]:
        contender = Contender(**json.loads(sys.argv[2]))
        for _ in sys.stdin:
            print(json.dumps(contender.step()), flush=True)
        return
    modes = dict(steps=steps, tricks=steps, old=steps, data=data, start=start)
    names = {name for groups in GROUPS.values() for group in groups for name in group.split(",")}
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("mode", choices=modes, nargs="?", default="steps")
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step (default: 16)")
    parser.add_argument("--micro", type=int, help="rows of a micro-batch (default: the batch)")
    parser.add_argument("--rounds", type=int, default=11, help="measured steps of each (default: 11)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before those (default: 4)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile all but hf-15 default")
    parser.add_argument("--only", nargs="+", choices=sorted(names), help="measure only these contenders")
    parser.add_argument("--against", help="old: folder of the other checkout")
    parser.add_argument("--text", help="data, start: UTF-8 text files, a glob; 60 MB or more")
    parser.add_argument("--out", help="JSON file to write, with the seconds of every step")
    args = parser.parse_args()
    if not dict(old=args.against, data=args.text, start=args.text).get(args.mode, True):
        parser.error("old needs --against; data and start need --text")
    results = dict(args=vars(args), torch=torch.__version__, measured=modes[args.mode](args))
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
