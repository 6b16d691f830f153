"""What the clock says of 3ML, of vanilla MLM in the same code, and of transformers' RoBERTa.

    python experiments/speed.py                     base, n 128, batch 16: seconds per step
    python experiments/speed.py steps --shape large --batch 8 --rounds 4 --only vanilla-15 self-50
    python experiments/speed.py steps --device cuda --shape large --batch 1024 --micro 256 --compile
    python experiments/speed.py tricks              self-50 without each of its tricks
    python experiments/speed.py profile             where the time of a step goes
    python experiments/speed.py products            a block's matrix products, over their rows
    python experiments/speed.py sweep               tokens/s over row length, masking rate and width
    python experiments/speed.py batch               the largest batch that fits into --gb of memory
    python experiments/speed.py ddp                 two processes of one core against two runs apart
    python experiments/speed.py data --text 'corpus/*.txt'    data.py against tokenizers' own speed
    python experiments/speed.py start --text 'corpus/*.txt'   from the command to the first step

On a CPU each contender is a process of its own, so that memory and allocator are its own, and they
take turns, a step each, A B C A B C ...; ratios are medians over the rounds. On a GPU they come one
after another in one process. A step is what train.py does: rows, corruption, forward, backward,
gradient norm, optimizer. `hf-15 default` is transformers as it comes, under the same autocast and
optimizer; `hf-15` has train.py's allocator settings and compile too. FLOP/s are flops.forward x 3,
for hf as well, though it sends every position through the head. --out writes all seconds as JSON.
"""

import argparse
import glob
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import flops  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from data import Data, Vocab, counts, load_tokenizer  # noqa: E402

V = 50265
SHAPES = {
    "base": dict(n_layer=12, n_embd=768, norm="post", seq_len=128),
    "base512": dict(n_layer=12, n_embd=768, norm="post", seq_len=512),
    "large": dict(n_layer=24, n_embd=1024, norm="pre", seq_len=128),
}
MODELS = {  # decoder, masking rate
    "hf-15 default": ("hf", 0.15), "hf-15": ("hf", 0.15), "vanilla-15": ("none", 0.15),
    "self-50": ("self", 0.5), "vanilla-40": ("none", 0.4), "self-40": ("self", 0.4),
    "cross-40": ("cross", 0.4),
    # for the sweep over masking rates
    "vanilla": ("none", 0.15), "self": ("self", 0.15), "cross": ("cross", 0.15),
    # what each trick is worth: self-50 without it; and two that are not taken
    "own malloc": ("self", 0.5), "F.dropout": ("self", 0.5), "F.cross_entropy": ("self", 0.5),
    "compiled": ("self", 0.5), "V 50304": ("self", 0.5),
}  # fmt: skip
TRICKS = ["self-50", "own malloc", "F.dropout", "F.cross_entropy"]
NO_MEMORY = 3  # a worker's exit status
# what a machine of 24 GB holds at once; vanilla-15, to compare with, is in each
GROUPS = [
    ["hf-15 default", "hf-15", "vanilla-15", "self-50"],
    ["vanilla-15", "vanilla-40", "self-40", "cross-40"],
]
LARGE_GROUPS = [["vanilla-15", name] for name in ("self-50", "self-40", "cross-40")]


# The contenders


class RandomTokens(Data):
    """Data without a folder: words at random, RoBERTa's vocabulary."""

    def __init__(self, size=1 << 22):
        self.vocab = Vocab(V)
        rng = np.random.default_rng(0)
        self.tokens = {"train": rng.integers(4, V - 1, size, np.uint16)}


class HuggingFace(torch.nn.Module):
    """transformers' RobertaForMaskedLM behind MaskedLM's interface."""

    def __init__(self, config):
        super().__init__()
        import transformers

        name = "Roberta" if config.norm == "post" else "RobertaPreLayerNorm"
        c = getattr(transformers, name + "Config")(
            vocab_size=V, max_position_embeddings=config.seq_len + 2, layer_norm_eps=1e-5,
            num_hidden_layers=config.n_layer, hidden_size=config.n_embd, type_vocab_size=1,
            num_attention_heads=config.n_embd // 64, intermediate_size=4 * config.n_embd,
        )  # fmt: skip
        self.net = getattr(transformers, name + "ForMaskedLM")(c)

    def forward(self, batch):
        labels = torch.full_like(batch.inputs, -100).scatter(1, batch.predict, batch.labels)
        return self.net(input_ids=batch.inputs, labels=labels).loss


class Contender:
    """A model, its optimizer and its data, a step at a time."""

    def __init__(
        self, name, batch, micro=None, shape="base", device="cpu", compile=False, **fields
    ):
        decoder, rate = MODELS[name]
        fields = {"mask_rate": rate} | SHAPES[shape] | fields
        self.config = train.Config(
            **fields, decoder="none" if decoder == "hf" else decoder, lr=1e-4, batch_size=batch,
            micro_batch_size=micro or batch,
        )  # fmt: skip
        self.config.n_positions = self.config.seq_len
        if device == "cpu" and name not in ("hf-15 default", "own malloc"):
            train.keep_freed_memory()
        if name == "F.dropout":
            model.dropout = F.dropout
        if name == "F.cross_entropy":
            model.CrossEntropy.apply = lambda logits, labels: F.cross_entropy(
                model.exact(logits), labels, reduction="none"
            )
        torch.set_float32_matmul_precision("high")
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device(device)
        self.machine = train.Machine(rank, world, device, train.pick_dtype("auto", device))
        torch.manual_seed(0)
        config = train.model_config(self.config, 50304 if name == "V 50304" else V)
        self.model = HuggingFace(self.config) if decoder == "hf" else model.MaskedLM(config)
        self.model.to(device).train()
        self.optimizer = train.make_optimizer(self.model, self.config)
        if world > 1:
            torch.distributed.init_process_group("gloo")
            ddp = torch.nn.parallel.DistributedDataParallel
            self.model = ddp(self.model, gradient_as_bucket_view=True)
        if (compile and name != "hf-15 default") or name == "compiled":
            self.model.compile()
        self.data, self.done = RandomTokens(), 0
        k, n_m, _ = counts(self.config.seq_len, self.config.mask_rate, self.config.strategy)
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
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        assert torch.isfinite(loss + torch.nn.utils.get_total_norm(grads))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        t.append(self.now())
        self.done += 1
        return [b - a for a, b in zip(t, t[1:])]

    def answer(self):
        """A step, as the table wants it."""
        data, model, optimizer = self.step()
        if self.machine.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = data + model + optimizer
        return dict(seconds=seconds, data=data, optimizer=optimizer, bytes=peak, flops=self.flops)


class Process:
    """A Contender in a process of its own: a step for each line it reads. With `core`, on that
    core alone."""

    def __init__(self, core=None, env=(), **settings):
        self.pipe = subprocess.Popen(
            [sys.executable, __file__, "worker", json.dumps(settings)],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | dict(env),
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, [core]),
        )  # fmt: skip

    def ask(self):
        with suppress(BrokenPipeError):  # hear() tells why
            self.pipe.stdin.write("step\n")
            self.pipe.stdin.flush()

    def hear(self):
        """What a step took; None if it did not fit into memory."""
        if line := self.pipe.stdout.readline():
            return json.loads(line)
        if self.pipe.wait() not in (NO_MEMORY, -9):
            sys.exit("a contender failed, see above")
        return None

    def end(self):
        self.pipe.stdin.close()
        self.pipe.wait()


def worker(settings):
    if gb := settings.pop("gb", None):
        resource.setrlimit(resource.RLIMIT_DATA, (int(gb * 1e9),) * 2)
    try:
        contender = Contender(**settings)
        for _ in sys.stdin:
            print(json.dumps(contender.answer()), flush=True)
    except (RuntimeError, MemoryError) as e:
        if not train.out_of_memory(e):
            raise
        sys.exit(NO_MEMORY)


def say(*what):
    print(*what, file=sys.stderr, flush=True)


def product_rate(device, size):
    """FLOP/s of a square matrix product in the dtype of the steps, the best of several."""
    dtype, cuda = train.pick_dtype("auto", torch.device(device)), device == "cuda"
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best, times = float("inf"), 10 if cuda else 1
    for _ in range(8):
        torch.cuda.synchronize() if cuda else None
        t = time.perf_counter()
        for _ in range(times):
            a @ b
        torch.cuda.synchronize() if cuda else None
        best = min(best, (time.perf_counter() - t) / times)
    return 2 * size**3 / best


# steps: the table


def take_turns(names, rounds, warmup, **settings):
    """{name: [a dict per step]} and the product rate, all measured side by side."""
    processes = {name: Process(name=name, **settings) for name in names}
    results, rate = {name: [] for name in names}, 0
    for r in range(warmup + rounds):
        rate = max(rate, product_rate("cpu", 2048))
        for name, process in processes.items():
            process.ask()
            step = process.hear() or sys.exit(f"{name}: no memory left; fewer side by side: --only")
            if r >= warmup:
                results[name].append(step)
        say(
            f"round {r + 1}/{warmup + rounds}",
            *(f"{x[-1]['seconds']:.3f}" for x in results.values() if x),
        )
    for process in processes.values():
        process.end()
    return results, rate


def one_by_one(names, rounds, warmup, **settings):
    """The same on a GPU; None where memory did not suffice."""
    results, rate = {}, product_rate("cuda", 8192)
    for name in names:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            contender = Contender(name=name, **settings)
            results[name] = [contender.answer() for _ in range(warmup + rounds)][warmup:]
        except torch.cuda.OutOfMemoryError:
            results[name] = None
        contender = None
        say(name, results[name] and [round(x["seconds"], 3) for x in results[name]])
    return results, max(rate, product_rate("cuda", 8192))


def ratio(a, b):
    """Median of a's seconds over b's, step by step."""
    return statistics.median(x["seconds"] / y["seconds"] for x, y in zip(a, b))


def steps(args):
    n = SHAPES[args.shape]["seq_len"]
    settings = dict(shape=args.shape, batch=args.batch, micro=args.micro, device=args.device)
    settings |= dict(compile=args.compile)
    groups = LARGE_GROUPS if args.shape == "large" else GROUPS
    groups = [TRICKS] if args.what == "tricks" else groups
    groups = [args.only] if args.only else groups
    run = take_turns if args.device == "cpu" else one_by_one
    measured = [run(names, args.rounds, args.warmup, **settings) for names in groups]
    rate = max(rate for _, rate in measured)
    print(
        f"{args.shape}, n {n}, batch {args.batch}, micro-batch {args.micro or args.batch}, "
        f"{args.device}, compile {args.compile}, torch {torch.__version__}; matrix products at "
        f"{rate / 1e12:.3f} TFLOP/s"
    )
    print(
        f"{'':<17}{'tokens/s':>9}{'s/step':>8}{'least-most':>14}{'TFLOP/s':>9}{'of rate':>9}"
        f"{'GB':>7}{'data':>7}{'norm, AdamW':>13}"
    )
    for results, _ in measured:
        for name, x in results.items():
            if x is None:
                print(f"{name:<17} out of memory")
                continue
            seconds = [s["seconds"] for s in x]
            middle = statistics.median(seconds)
            speed = x[0]["flops"] / middle
            data, optimizer = (statistics.median(s[k] for s in x) for k in ("data", "optimizer"))
            print(
                f"{name:<17}{args.batch * n / middle:>9,.0f}{middle:>8.3f}"
                f"{f'{min(seconds):.3f}-{max(seconds):.3f}':>14}{speed / 1e12:>9.3f}"
                f"{speed / rate:>9.1%}{x[-1]['bytes'] / 1e9:>7.2f}{data / middle:>7.2%}"
                f"{optimizer / middle:>13.1%}"
            )
    for results, _ in measured:
        base = results.get("vanilla-15")
        for name, x in results.items():
            if "own malloc" in results and name != "self-50":
                print(f"{name} / self-50: clock {ratio(x, results['self-50']):.3f}")
            if base and x and name.startswith(("self", "cross")):
                clock, counted = ratio(base, x), base[0]["flops"] / x[0]["flops"]
                print(
                    f"vanilla-15 / {name}: clock {clock:.3f}, FLOPs {counted:.3f}; clock over "
                    f"FLOPs {clock / counted:.3f}"
                )
            if name.startswith("hf") and x and results.get("self-50"):
                print(f"{name} / self-50: clock {ratio(x, results['self-50']):.2f}")
    return dict(product_rate=rate, results=[x for x, _ in measured])


# profile: where the time of a step goes

KINDS = {  # operators, some of them only on tensors as wide as the vocabulary
    "matrix products": ("mm", "addmm", "bmm"),
    "cross-entropy, word embedding": (
        *(f"{op} {V}" for op in ("_softmax", "amax", "scatter_add_", "mul", "copy_", "sum")),
        "CrossEntropy", "CrossEntropyBackward",
    ),
    "casts and copies": ("copy_", "cat", "_to_copy"),
    "dropout": ("ge", "mul", "mul_", "randint", "random_"),
    "GELU, LayerNorm, softmax": (
        "gelu", "gelu_backward", "native_layer_norm", "native_layer_norm_backward", "_softmax",
        "_softmax_backward_data",
    ),
    "AdamW, gradient norm": ("_fused_adamw_", "linalg_vector_norm"),
    "zeros and sums of gradients": ("fill_", "zero_", "add_", "sum", "embedding_dense_backward"),
}  # fmt: skip


def profile(args):
    """Seconds of a step by kind, in the profiler's eyes, which make it somewhat slower; and how
    fast its matrix products are among themselves."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    names = args.only or ["vanilla-15", "self-50", "self-40", "cross-40"]
    rate, results = product_rate("cpu", 2048), {}
    for name in names:
        contender = Contender(name, args.batch, shape=args.shape)
        for _ in range(args.warmup):
            contender.step()
        rounds = []
        for _ in range(5):
            with profiler(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
                contender.step()
            seconds = dict.fromkeys([*KINDS, "the rest"], 0.0)
            for e in seen.key_averages(group_by_input_shape=True):
                op = e.key.removeprefix("aten::") + f" {V}" * (str(V) in str(e.input_shapes))
                fits = (k for k, ops in KINDS.items() if op in ops or op.split()[0] in ops)
                seconds[next(fits, "the rest")] += e.self_cpu_time_total / 1e6
            rounds.append(seconds)
        results[name] = {k: statistics.median(x[k] for x in rounds) for k in seconds}
        results[name]["flops"] = contender.flops
        contender = None
        say(name, results[name])
    print(
        f"{args.shape}, batch {args.batch}: seconds of a step" + "".join(f"{x:>12}" for x in names)
    )
    for key in seconds:
        print(f"{key:<36}" + "".join(f"{results[x][key]:>12.3f}" for x in names))
    speed = [results[x]["flops"] / results[x]["matrix products"] / 1e12 for x in names]
    print(f"{'TFLOP/s of the products alone':<36}" + "".join(f"{x:>12.3f}" for x in speed))
    print(f"{f'  of {rate / 1e12:.3f}':<36}" + "".join(f"{x * 1e12 / rate:>12.0%}" for x in speed))
    base = results["vanilla-15"]
    for key, label in (
        ("flops", "vanilla-15's FLOPs over these"),
        ("matrix products", "its products' seconds"),
    ):
        print(f"{label:<36}" + "".join(f"{base[key] / results[x][key]:>12.3f}" for x in names))
    return results


def products(args):
    """TFLOP/s of the products of an MLP of width d, forward and backward, over their rows: self-50
    has 1,248 of them at batch 16, cross-40 and self-40 1,408, vanilla MLM 2,048."""
    train.keep_freed_memory()
    dtype, d = train.pick_dtype("auto", torch.device("cpu")), SHAPES[args.shape]["n_embd"]
    rows = (512, 624, 768, 1024, 1248, 1312, 1408, 1536, 2048, 2496, 4096, 8192)
    up, down = (torch.randn(s, dtype=dtype) for s in ((4 * d, d), (d, 4 * d)))
    kinds = {
        "fc1": lambda x, h: F.linear(x, up), "fc2": lambda x, h: F.linear(h, down),
        "dx of fc1": lambda x, h: h @ up, "dx of fc2": lambda x, h: x @ down,
        "dW of fc1": lambda x, h: h.t() @ x, "dW of fc2": lambda x, h: x.t() @ h,
    }  # fmt: skip
    print(f"{'rows':<8}" + "".join(f"{kind:>11}" for kind in kinds), "TFLOP/s")
    results = []
    for m in rows:
        x, h = torch.randn(m, d, dtype=dtype), torch.randn(m, 4 * d, dtype=dtype)
        results.append(dict(rows=m))
        for kind, product in kinds.items():
            seconds = []
            for _ in range(args.warmup + args.rounds):
                t = time.perf_counter()
                product(x, h)
                seconds.append(time.perf_counter() - t)
            results[-1][kind] = 8 * m * d * d / statistics.median(seconds[args.warmup :])
        print(f"{m:<8}" + "".join(f"{results[-1][k] / 1e12:>11.2f}" for k in kinds), flush=True)
    return results


# sweep, batch, ddp: what becomes of it as work grows


def alone(rounds=1, warmup=1, **settings):
    """The last steps of a contender in a process of its own; None for a step that did not fit."""
    process = Process(**settings)
    answers = []
    for _ in range(warmup + rounds):
        process.ask()
        answers.append(process.hear())
    process.end()
    return answers[warmup:]


def sweep(args):
    """Tokens/s and TFLOP/s of base, 2,048 tokens a step throughout."""
    results = []

    def table(names, label, field, values):
        print(f"{label:<10}" + "".join(f"{name:>20}" for name in names), flush=True)
        for value in values:
            cells = []
            for name in names:
                n = value if field == "seq_len" else 128
                x = alone(args.rounds, args.warmup, name=name, batch=2048 // n, **{field: value})
                seconds = statistics.median(s["seconds"] for s in x)
                results.append(
                    dict(name=name, seconds=seconds, flops=x[0]["flops"], **{field: value})
                )
                cells.append(f"{2048 / seconds:>13,.0f}{x[0]['flops'] / seconds / 1e12:>7.3f}")
            print(f"{value:<10}" + "".join(cells), flush=True)
        print()

    names = ("vanilla-15", "self-50", "cross-40")
    table(names, "n", "seq_len", (64, 128, 256, 512))
    table(names, "d_en", "n_embd", (256, 512, 768, 1024))
    names = ("vanilla", "self", "cross")
    table(names, "r", "mask_rate", (0.15, 0.3, 0.4, 0.5, 0.65, 0.8))
    return results


def batch(args):
    """The largest power of two whose step does not fail for want of memory."""
    results = {}
    print(f"{'':<17}{'largest batch in':>18}{f'{args.gb:g} GB':>7}{'GB at 16':>10}")
    for name in ("hf-15", "vanilla-15", "self-50"):
        sizes, size = {}, 16
        while x := alone(warmup=0, name=name, batch=size, gb=args.gb)[0]:
            sizes[size] = x["bytes"]
            say(name, size, x["bytes"] / 1e9)
            size *= 2
        results[name] = sizes
        if not sizes:
            sys.exit(f"{name}: 16 rows do not fit into {args.gb:g} GB; give more --gb")
        print(f"{name:<17}{max(sizes):>25}{sizes[16] / 1e9:>10.2f}", flush=True)
    return results


def ddp(args):
    """Two processes on a core each, 8 rows each: with DistributedDataParallel, and apart."""
    port = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29555",
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    together = [
        Process(core, port | {"RANK": str(core)}, name="self-50", batch=16, micro=8)
        for core in (0, 1)
    ]
    one = {"OMP_NUM_THREADS": "1"}
    apart = [Process(core, one, name="self-50", batch=8) for core in (0, 1)]
    seconds = {"together": [], "apart": []}
    for r in range(args.warmup + args.rounds):
        for name, pair in (("together", together), ("apart", apart)):
            for process in pair:
                process.ask()
            both = [process.hear()["seconds"] for process in pair]
            if r >= args.warmup:
                seconds[name].append(max(both))
        say(f"round {r + 1}", {k: x[-1:] for k, x in seconds.items()})
    for process in together + apart:
        process.end()
    share = statistics.median(a / b for a, b in zip(seconds["apart"], seconds["together"]))
    print(f"DDP, 2 processes x 1 core, base self-50, 8 rows each: {share:.0%} of two runs apart")
    return seconds | {"efficiency": share}


# data, start: the commands around it


def timed(command, **more):
    """(seconds, peak bytes) of a command and its text; it must succeed."""
    t, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, **more)
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            peak = max(peak, int(line.split()[1]) * 1024 if line.startswith("VmHWM") else 0)
        time.sleep(0.1)
    assert process.returncode == 0, command
    return time.perf_counter() - t, peak


def data(args):
    """data.py with a tokenizer at hand, against encode_batch_fast on the same text in memory."""
    texts = [Path(f).read_bytes() for f in sorted(glob.glob(args.text))]
    whole = b"\n\n".join(texts)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "sample.txt").write_bytes(whole[: 20 << 20])
        prepare = [str(ROOT / "data.py"), "--input"]
        timed([*prepare, str(here / "sample.txt"), "--out", str(here / "bpe")])
        tokenizer, _ = load_tokenizer(here / "bpe/tokenizer.json")
        documents = whole[: 64 << 20].decode(errors="ignore").split("\n\n")
        t = time.perf_counter()
        for i in range(0, len(documents), 4096):
            tokenizer.encode_batch_fast(documents[i : i + 4096], add_special_tokens=False)
        own = sum(map(len, documents)) / (time.perf_counter() - t)
        print(
            f"tokenizers' encode_batch_fast: {own / 1e6:.2f} MB/s on {os.cpu_count()} cores",
            flush=True,
        )
        results["encode_batch_fast"] = own
        for size in (100, 1000):
            text = here / f"{size}.txt"
            with open(text, "wb") as f:
                for _ in range(-(-size * 10**6 // len(whole))):
                    f.write(
                        whole[: size * 10**6 - f.tell()].decode(errors="ignore").encode() + b"\n\n"
                    )
            command = [*prepare, str(text), "--tokenizer", str(here / "bpe/tokenizer.json")]
            seconds, peak = timed([*command, "--out", str(here / f"{size}")])
            results[size] = dict(seconds=seconds, bytes=peak)
            print(
                f"data.py, {size} MB: {seconds:.0f} s, {size / seconds:.2f} MB/s, peak memory "
                f"{peak / 1e6:.0f} MB",
                flush=True,
            )
    return results


def start(args):
    """Seconds from `python train.py`, base shape, to its line about the model, and to its first
    step's."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_bytes(
            b"\n\n".join(Path(f).read_bytes() for f in sorted(glob.glob(args.text)))
        )
        prepare = [
            str(ROOT / "data.py"),
            "--input",
            f"{folder}/text.txt",
            "--out",
            f"{folder}/data",
        ]
        timed(prepare)
        seconds = []
        for i in range(3):
            command = (
                f"{ROOT}/train.py --recipe longer-base --seq_len 128 --batch_size 16 --max_steps 1 "
                "--micro_batch_size 16 --log_every 1 --eval_rows 16 --device cpu --data "
                f"{folder}/data --out {folder}/out{i}"
            )
            t = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *command.split()], stdout=subprocess.PIPE, text=True,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            lines = {}
            for line in process.stdout:
                for key in ("parameters on", "step      1/1  loss"):
                    if key in line:
                        lines[key.split()[0]] = time.perf_counter() - t
            process.wait()
            seconds.append(lines)
    middle = {k: statistics.median(x[k] for x in seconds) for k in seconds[0]}
    print(
        f"to the model: {middle['parameters']:.1f} s; to the end of the first step: "
        f"{middle['step']:.1f} s"
    )
    return seconds


def main():
    modes = {
        "steps": steps,
        "tricks": steps,
        "profile": profile,
        "products": products,
        "sweep": sweep,
        "batch": batch,
        "ddp": ddp,
        "data": data,
        "start": start,
    }
    if sys.argv[1:2] == ["worker"]:
        return worker(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=modes, nargs="?", default="steps")
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step (default: 16)")
    parser.add_argument("--micro", type=int, help="rows at once (default: the batch)")
    parser.add_argument("--rounds", type=int, default=11, help="steps of each (default: 11)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before those (default: 4)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile all but hf-15 default"
    )
    parser.add_argument("--only", nargs="+", choices=MODELS, help="these contenders alone")
    parser.add_argument("--gb", type=float, default=10, help="batch: memory in GB (default: 10)")
    parser.add_argument("--text", default="", help="data, start: UTF-8 text files, a glob")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    if args.what in ("data", "start") and not glob.glob(args.text):
        parser.error(f"--text {args.text!r}: no such files; name UTF-8 text, 60 MB or more")
    results = modes[args.what](args)
    if args.out:
        results = dict(args=vars(args), torch=torch.__version__, measured=results)
        Path(args.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
