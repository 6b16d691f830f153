"""Seconds per step of 3ML, of vanilla MLM in the same code, and of transformers' RoBERTa, in one
run.

    python experiments/speed.py                               CPU: base, n 128, batch 16
    python experiments/speed.py --shape large --batch 8 --rounds 4 --only vanilla-15 self-50
    self-40 cross-40 python experiments/speed.py --device cuda --shape large --batch 1024 --micro
    256 --compile yes

On a CPU each contender is a process of its own (so that memory and allocator are its own) and
they take turns, one step each, A B C A B C ...; on a GPU they come one after another in one
process. A step is what train.py does: rows, corruption, forward, backward, gradient norm,
optimizer. `hf-15 default` is transformers as it comes under the same autocast and optimizer;
`hf-15` has train.py's allocator settings and compile too. Prints a table, and writes it with
every step's seconds to --out as JSON."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flops
import train
from data import Data, Vocab, counts
from model import MaskedLM

SHAPES = {
    "base": dict(n_layer=12, n_embd=768, norm="post", seq_len=128),
    "base512": dict(n_layer=12, n_embd=768, norm="post", seq_len=512),
    "large": dict(n_layer=24, n_embd=1024, norm="pre", seq_len=128),
}
MODELS = {  # decoder, masking rate
    "hf-15 default": ("hf", 0.15),
    "hf-15": ("hf", 0.15),
    "vanilla-15": ("none", 0.15),
    "vanilla-40": ("none", 0.4),
    "self-40": ("self", 0.4),
    "self-50": ("self", 0.5),
    "cross-40": ("cross", 0.4),
}


class RandomTokens(Data):
    """Data without a folder: words at random, RoBERTa's vocabulary."""

    def __init__(self, size=1 << 22):
        self.vocab = Vocab(50265)
        rng = np.random.default_rng(0)
        self.tokens = {"train": rng.integers(4, 50264, size, np.uint16)}


class HuggingFace(torch.nn.Module):
    """transformers' RobertaForMaskedLM behind MaskedLM's interface."""

    def __init__(self, config):
        super().__init__()
        import transformers

        name = "Roberta" if config.norm == "post" else "RobertaPreLayerNorm"
        c = getattr(transformers, name + "Config")(
            vocab_size=50265,
            max_position_embeddings=config.seq_len + 2,
            num_hidden_layers=config.n_layer,
            hidden_size=config.n_embd,
            num_attention_heads=config.n_embd // 64,
            intermediate_size=4 * config.n_embd,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
        self.net = getattr(transformers, name + "ForMaskedLM")(c)

    def forward(self, batch):
        labels = torch.full_like(batch.inputs, -100).scatter(1, batch.predict, batch.labels)
        return self.net(input_ids=batch.inputs, labels=labels).loss


class Contender:
    def __init__(self, name, shape, batch, micro, device, dtype, compile, sweep):
        decoder, rate = MODELS[name]
        self.config = train.Config(
            **{**SHAPES[shape], **sweep.get("shape", {})},
            decoder="none" if decoder == "hf" else decoder,
            mask_rate=sweep.get("rate", rate),
            batch_size=batch,
            micro_batch_size=micro,
            lr=1e-4,
            device=device,
            dtype=dtype,
        )
        if "default" not in name and device == "cpu":
            train.keep_freed_memory()
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(0)
        self.config.n_positions = self.config.seq_len
        self.data, device = RandomTokens(), torch.device(device)
        self.machine = train.Machine(0, 1, device, train.pick_dtype(dtype, device))
        self.model = (
            HuggingFace(self.config)
            if decoder == "hf"
            else MaskedLM(train.model_config(self.config, 50265))
        )
        self.model.to(device).train()
        self.optimizer = train.make_optimizer(self.model, self.config)
        if compile and "default" not in name:
            self.model.compile()
        self.done = 0
        k, n_m, _ = counts(self.config.seq_len, self.config.mask_rate, self.config.strategy)
        config = train.model_config(self.config, 50265)
        self.flops = 3 * batch * flops.forward(config, self.config.seq_len, n_m, k)

    def now(self):
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self):
        """Seconds of: rows and corruption, forward and backward, norm and optimizer."""
        t = [self.now()]
        batch = train.step_batch(self.data, self.config, self.done, self.machine.device)
        t.append(self.now())
        loss = train.backward(self.model, batch, self.config, self.done, self.machine)
        t.append(self.now())
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.model.parameters() if p.grad is not None]
        )
        assert torch.isfinite(loss + norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        t.append(self.now())
        self.done += 1
        return [b - a for a, b in zip(t, t[1:])]

    def peak_memory(self):
        if self.machine.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def product_rate(device, dtype, size):
    """FLOP/s of a square matrix product on random data, the best of several."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        if device == "cuda":
            torch.cuda.synchronize()
        t = time.perf_counter()
        for _ in range(10 if device == "cuda" else 1):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - t) / (10 if device == "cuda" else 1))
    return 2 * size**3 / best


def worker(settings):
    """A contender behind a pipe: a step for each line read."""
    contender = Contender(**settings)
    for _ in sys.stdin:
        print(json.dumps([contender.step(), contender.peak_memory(), contender.flops]), flush=True)


def take_turns(settings, rounds, warmup):
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(s)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for s in settings
    ]
    results = [[] for _ in settings]
    rates = []
    dtype = train.pick_dtype(settings[0]["dtype"], torch.device("cpu"))
    for r in range(warmup + rounds):
        rates.append(product_rate("cpu", dtype, 2048))
        for process, result in zip(processes, results):
            process.stdin.write("step\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            if r >= warmup:
                result.append(answer)
        print(
            f"round {r + 1}/{warmup + rounds}",
            [round(sum(x[-1][0]), 3) for x in results if x],
            file=sys.stderr,
        )
    for process in processes:
        process.stdin.close()
        process.wait()
    return results, max(rates)


def one_by_one(settings, rounds, warmup):
    results = []
    rate = product_rate("cuda", torch.bfloat16, 8192)
    for s in settings:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            contender = Contender(**s)
            steps = [contender.step() for _ in range(warmup + rounds)][warmup:]
            results.append([(x, contender.peak_memory(), contender.flops) for x in steps])
        except torch.cuda.OutOfMemoryError:
            results.append(None)
        contender = None
        print(
            s["name"],
            results[-1] and [round(sum(x[0]), 3) for x in results[-1]],
            file=sys.stderr,
            flush=True,
        )
    return results, max(rate, product_rate("cuda", torch.bfloat16, 8192))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro", type=int, help="rows at once (default: the batch)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", choices=("yes", "no"), default="no")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--sweep",
        type=json.loads,
        default={},
        help='changes, as {"shape": {"seq_len": 256}, "rate": 0.3}',
    )
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    settings = [
        dict(
            name=name,
            shape=args.shape,
            batch=args.batch,
            micro=args.micro or args.batch,
            device=args.device,
            dtype=args.dtype,
            compile=args.compile == "yes",
            sweep=args.sweep,
        )
        for name in args.only
    ]
    run = take_turns if args.device == "cpu" else one_by_one
    results, rate = run(settings, args.rounds, args.warmup)
    n = args.sweep.get("shape", {}).get("seq_len", SHAPES[args.shape]["seq_len"])
    table = {}
    for name, steps in zip(args.only, results):
        if steps is None:
            table[name] = None
            continue
        seconds = [sum(x) for x, *_ in steps]
        middle = statistics.median(seconds)
        table[name] = dict(
            tokens_per_s=args.batch * n / middle,
            seconds=middle,
            spread=[min(seconds), max(seconds)],
            flops_per_s=steps[0][2] / middle,
            share_of_peak=steps[0][2] / middle / rate,
            peak_gb=steps[-1][1] / 1e9,
            data_share=statistics.median(x[0] for x, *_ in steps) / middle,
            optimizer_share=statistics.median(x[2] for x, *_ in steps) / middle,
            flops=steps[0][2],
            all=seconds,
        )
    print(
        f"{args.shape}, n {n}, batch {args.batch}, micro-batch {args.micro or args.batch}, "
        f"{args.device}, compile "
        f"{args.compile}, torch {torch.__version__}; products at {rate / 1e12:.2f} TFLOP/s"
    )
    print(
        f"{'':<15}{'tok/s':>10}{'s/step':>9}{'min-max':>16}{'TFLOP/s':>9}{'of peak':>9}{'GB':>7}"
        f"{'data':>7}{'opt.':>7}"
    )
    for name, t in table.items():
        if t is None:
            print(f"{name:<15} out of memory")
            continue
        spread = f"{t['spread'][0]:.3f}-{t['spread'][1]:.3f}"
        print(
            f"{name:<15}{t['tokens_per_s']:>10,.0f}{t['seconds']:>9.3f}{spread:>16}"
            f"{t['flops_per_s'] / 1e12:>9.2f}"
            f"{t['share_of_peak']:>9.1%}{t['peak_gb']:>7.2f}{t['data_share']:>7.1%}{t['optimizer_share']:>7.1%}"
        )
    if base := table.get("vanilla-15"):
        for name, t in table.items():
            if t and name.startswith(("self", "cross")):
                clock = statistics.median(a / b for a, b in zip(base["all"], t["all"]))
                print(
                    f"vanilla-15 / {name}: clock {clock:.3f}, FLOPs "
                    f"{base['flops'] / t['flops']:.3f}, "
                    f"clock over FLOPs {clock / (base['flops'] / t['flops']):.3f}"
                )
    for hf in ("hf-15 default", "hf-15"):
        if table.get(hf) and table.get("self-50"):
            ratio = statistics.median(
                a / b for a, b in zip(table[hf]["all"], table["self-50"]["all"])
            )
            print(f"{hf} / self-50: clock {ratio:.2f}")
    if args.out:
        Path(args.out).write_text(
            json.dumps(dict(args=vars(args), product_rate=rate, table=table), indent=1)
        )


if __name__ == "__main__":
    main()
