"""Kills, starves and misfeeds real runs, and holds what comes out against runs left alone.

    python experiments/faults.py                       everything: some 25 minutes on two cores
    python experiments/faults.py kill --kills 4        one section; the others: world signal rank
                                                       disk damage resume diverge input haul

Prints a line for each thing tried: how often, how often it was survived, and what was seen. Exit
status 1 if anything was not. `disk` mounts a small tmpfs, for which it must be root. All runs are
tiny (two layers of 128, fp32 on the CPU) and deterministic: "survived" means parameters, optimizer
state and exported encoder bit by bit, and the log in all but timings.
"""

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
RUN = (
    "--n_layer 2 --n_embd 128 --head_size 32 --seq_len 32 --batch_size 16 --micro_batch_size 8 "
    "--max_steps 60 --eval_every 9 --save_every 4 --log_every 1 --dropout 0.1 --device cpu "
    "--dtype fp32"
)
TABLE = []


def row(what, tried, survived, seen=""):
    TABLE.append((what, tried, survived))
    print(f"{what:<44}{tried:>4} tried {survived:>4} survived  {seen}", flush=True)


# A laboratory: data, commands, and runs that were left alone


class Lab:
    def __init__(self, folder):
        self.folder, self.count = Path(folder), 0
        self.log = open(self.folder / "log", "w+")
        rng = random.Random(0)
        words = [f"{a}{b}" for a in ("tor", "mun", "sel", "pa") for b in ("ka", "lo", "", "rest")]
        texts = [" ".join(rng.choices(words, k=60)) for _ in range(4000)]
        (self.folder / "text.txt").write_text("\n\n".join(texts))
        self.run(self.prepare(self.folder / "data"))
        self.alone = {}

    def prepare(self, out):
        text = f"data.py --input {self.folder}/text.txt --vocab_size 400 --val 0.1 --out {out}"
        return [*PYTHON, *text.split()]

    def train(self, out, more="", launcher=PYTHON, data=None):
        text = f"train.py {RUN} --data {data or self.folder / 'data'} --out {out} {more}"
        return [*launcher, *text.split()]

    def new(self):
        """A folder's name that was not used yet."""
        self.count += 1
        return self.folder / f"out{self.count}"

    def start(self, command):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=ROOT, stdout=self.log, stderr=self.log, start_new_session=True, env=env
        )

    def run(self, command):
        """(exit status, stdout, stderr) of a command that is let run."""
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
        self.log.write(done.stdout + done.stderr)
        return done.returncode, done.stdout, done.stderr

    def left_alone(self, launcher=PYTHON):
        """The folder of a run that nobody disturbed."""
        key = len(launcher)
        if key not in self.alone:
            self.alone[key], t = self.new(), time.monotonic()
            assert self.run(self.train(self.alone[key], launcher=launcher))[0] == 0
            self.seconds = time.monotonic() - t
        return self.alone[key]

    def goes_on(self, out, launcher=PYTHON):
        """Whether the same command now ends as a run left alone does."""
        status, _, _ = self.run(self.train(out, launcher=launcher))
        return status == 0 and same_end(self.left_alone(launcher), out)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k != "config")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def log_of(out):
    with contextlib.suppress(FileNotFoundError):
        lines = (out / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]
    return []


def untimed(log):
    return [{k: v for k, v in e.items() if k not in ("tokens_per_s", "mfu")} for e in log]


def same_end(a, b):
    """Parameters and optimizer bit by bit, the exported encoder too, the log in all but timings."""
    files = ("ckpt.pt", "hf/pytorch_model.bin")
    pairs = [[torch.load(x / f, weights_only=True) for x in (a, b)] for f in files]
    return all(equal(*p) for p in pairs) and untimed(log_of(a)) == untimed(log_of(b))


def processes(word):
    """Ids of the living processes whose command line holds `word`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(word).encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return sorted(found)


def wait_until(condition, process, seconds=120):
    """True when the condition holds, False if the process ended before."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.001)
    return False


def step_of(out):
    return max((e["step"] for e in log_of(out)), default=0)


def one_line(status, err, *words):
    """Exit status 2 and one line on stderr, with the words in it."""
    lines = [x for x in err.splitlines() if x]
    return status == 2 and len(lines) == 1 and all(w in lines[0] for w in words)


# 1. kill -9


def evaluating(out):
    log = log_of(out)
    return bool(log) and log[-1]["step"] % 9 == 0 and "val_loss" not in log[-1]


MOMENTS = {
    "while evaluating": evaluating,
    "while writing a checkpoint": lambda out: (out / "ckpt.new.pt.tmp").exists(),
    "while exporting hf/": lambda out: any((out / "hf").glob("*.tmp")),
}


def killed(lab, command, moment, hits, good, rng, longest=3.0, agent=False):
    """Runs that are killed at the moment (None: at random ones) again and again till one finishes
    by itself, until `hits` have hit. Returns (hits, how many of them a good end followed)."""
    hit, survived = 0, 0
    for _ in range(4 * hits):
        if hit >= hits:
            break
        out, this, done = lab.new(), 0, False
        while not done:
            process = lab.start(command(out))
            if this >= 6:
                process.wait()
            elif moment is None or this >= 3:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(rng.uniform(0.3, longest))
            else:
                skip = rng.randrange(4)  # not always the first chance
                for _ in range(skip + 1):
                    wait_until(lambda o=out: not moment(o), process)
                    wait_until(lambda o=out: moment(o), process)
            done = process.poll() is not None
            if not done:
                for p in [process.pid] if agent else processes(out):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(p, signal.SIGKILL)
                process.wait()
                this += 1
                until = time.monotonic() + 10
                while agent and processes(out) and time.monotonic() < until:
                    time.sleep(0.05)
        hit += this
        survived += this * (process.returncode == 0 and good(out) and not processes(out))
        shutil.rmtree(out)
    return hit, survived


def kill(lab, kills):
    rng = random.Random(1)
    one, seconds = lab.left_alone(), lab.seconds
    two, few = lab.left_alone(TORCHRUN), max(1, kills // 5)

    def sha(out):
        return json.loads((out / "meta.json").read_text())["sha256"]

    hit = killed(
        lab, lab.prepare, None, few, lambda out: sha(out) == sha(lab.folder / "data"), rng, 3.0
    )
    row("SIGKILL while preparing data", *hit)
    good = [lambda out, x=x: same_end(x, out) for x in (one, two)]
    row("SIGKILL at random", *killed(lab, lab.train, None, kills, good[0], rng, seconds))
    for name, moment in MOMENTS.items():
        row(f"SIGKILL {name}", *killed(lab, lab.train, moment, few, good[0], rng))

    def together(out):
        return lab.train(out, launcher=TORCHRUN)

    row(
        "SIGKILL of torchrun and its 2 processes",
        *killed(lab, together, None, few, good[1], rng, lab.seconds),
    )
    row(
        "SIGKILL of torchrun alone",
        *killed(lab, together, None, few, good[1], rng, lab.seconds, True),
    )


# 2. World size


def world(lab, kills):
    """1 process, 2, and 1 -> 2 -> 1 across interruptions; 16 rows a step in micro-batches of 8."""
    one, two, mixed = lab.left_alone(), lab.left_alone(TORCHRUN), lab.new()
    for until, launcher in ((20, PYTHON), (40, TORCHRUN)):
        process = lab.start(lab.train(mixed, launcher=launcher))
        wait_until(lambda u=until: step_of(mixed) >= u, process)
        process.terminate()
        process.wait()
    at = torch.load(mixed / "ckpt.pt", weights_only=True)["step"]
    assert 40 <= at < 60, at
    lab.run(lab.train(mixed))
    a = log_of(one)
    for name, other in (("2 processes", two), ("1 -> 2 -> 1 processes", mixed)):
        b = log_of(other)
        rows = [e.get("rows") for e in a] == [e.get("rows") for e in b]
        keys = ("loss", "val_loss")
        far = max(abs(x[k] - y[k]) for x, y in zip(a, b) for k in keys if k in x)
        row(
            f"{name}: 1's rows, losses to 1e-4", 1, int(rows and len(a) == len(b) and far < 1e-4),
            f"largest difference of a loss: {far:.1e}",
        )  # fmt: skip


# 3. SIGTERM and Ctrl-C


def signals(lab, kills):
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")):
        for launcher, how in ((PYTHON, ""), (TORCHRUN, " under torchrun")):
            survived, seconds, times = 0, [], max(1, kills // 10)
            for i in range(times):
                out = lab.new()
                with open(lab.folder / "err", "w+") as err:
                    lab.log, kept = err, lab.log
                    process = lab.start(lab.train(out, launcher=launcher))
                    lab.log = kept
                    wait_until(lambda o=out, i=i: step_of(o) >= 7 + 5 * i, process)
                    t = time.monotonic()
                    # a terminal's Ctrl-C goes to all
                    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
                    status = process.wait(60)
                    seconds.append(time.monotonic() - t)
                    time.sleep(0.2)
                    err.seek(0)
                    text = err.read()
                right = status == 128 + number if launcher is PYTHON else status != 0
                said = text.count("the same command goes on") == 1 and 'train.py", line' not in text
                alone = not processes(out)
                survived += right and said and alone and lab.goes_on(out, launcher)
            row(f"{name}{how}", times, survived, f"gone after {max(seconds):.1f} s at most")


# 4. A rank dies or hangs


def rank(lab, kills):
    for number, name in ((signal.SIGKILL, "a process of two dies"), (signal.SIGSTOP, "one hangs")):
        out = lab.new()
        process = lab.start(lab.train(out, "--timeout 0.1", TORCHRUN))
        wait_until(lambda o=out: step_of(o) >= 10, process)
        workers = [p for p in processes(out) if p != process.pid]
        os.kill(workers[-1], number)
        t = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(120)
        seconds, left = time.monotonic() - t, processes(out)
        ended = process.returncode not in (0, None) and not left
        row(
            f"{name} (--timeout 0.1)", 1, int(ended and lab.goes_on(out, TORCHRUN)),
            f"all gone after {seconds:.0f} s",
        )  # fmt: skip


# 5. Full and read-only disks


def disk(lab, kills):
    where = lab.folder / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", str(where)]
    if subprocess.run(mount, capture_output=True).returncode:
        row("a full disk, a read-only one", 0, 0, "no tmpfs can be mounted here")
        return
    try:
        out = where / "out"
        status, _, err = lab.run(lab.train(out))
        full = one_line(status, err, "ckpt", "full")
        step = torch.load(out / "ckpt.pt", weights_only=True)["step"]
        subprocess.run(["mount", "-o", "remount,size=100m", str(where)], check=True)
        row("a full disk", 1, int(full and lab.goes_on(out)), f"at step {step + 4}: {err.strip()}")
        subprocess.run(["mount", "-o", "remount,ro", str(where)], check=True)
        status, _, err = lab.run(lab.train(where / "new"))
        row("a read-only disk", 1, int(one_line(status, err, str(where))), err.strip())
    finally:
        subprocess.run(["umount", str(where)])


# 6. Damage


def damage(lab, kills):
    half = lab.new()
    process = lab.start(lab.train(half))
    wait_until(lambda: step_of(half) >= 30, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    lab.left_alone()

    def cut(content):
        return content[: len(content) * 2 // 3]

    def flip(content):
        at = len(content) // 2
        return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]

    def torn(content):
        return content + b'{"step": 31, "lo'

    for file, how in (
        ("ckpt.pt", cut), ("ckpt.pt", flip), ("ckpt.prev.pt", flip), ("log.jsonl", torn),
    ):  # fmt: skip
        out = lab.new()
        shutil.copytree(half, out)
        (out / file).write_bytes(how((out / file).read_bytes()))
        status, text, _ = lab.run(lab.train(out))
        warned = "warning" in text or file != "ckpt.pt"
        row(
            f"{file} {how.__name__}",
            1,
            int(status == 0 and warned and same_end(lab.left_alone(), out)),
            "".join(x for x in text.splitlines() if "warning" in x).replace(str(lab.folder), ""),
        )  # fmt: skip
    out = lab.new()
    shutil.copytree(half, out)
    for file in ("ckpt.pt", "ckpt.prev.pt"):
        (out / file).write_bytes(cut((out / file).read_bytes()))
    status, _, err = lab.run(lab.train(out))
    row("both checkpoints cut", 1, int(one_line(status, err, "ckpt.pt", "ckpt.prev.pt")))
    for file in ("train.bin", "meta.json", "tokenizer.json"):
        for how in (cut, flip):
            folder, survived = lab.new(), 0
            shutil.copytree(lab.folder / "data", folder)
            (folder / file).write_bytes(how((folder / file).read_bytes()))
            if file == "train.bin" and how is flip:
                status, _, err = lab.run([*PYTHON, "data.py", "--verify", str(folder)])
                by = "by data.py --verify"
            else:
                status, _, err = lab.run(lab.train(lab.new(), data=folder))
                by = "at the start"
            survived = one_line(status, err, file)
            row(f"{file} {how.__name__}", 1, int(survived), by)


# 7, 8. Two runs on one folder, wrong resumes


def resume(lab, kills):
    out = lab.new()
    process = lab.start(lab.train(out))
    wait_until(lambda: step_of(out) >= 10, process)
    status, _, err = lab.run(lab.train(out))
    process.wait()
    refused = one_line(status, err, "another process")
    row("a second run on one folder", 1, int(refused and same_end(lab.left_alone(), out)))
    other = lab.new()
    (lab.folder / "text2.txt").write_text(
        (lab.folder / "text.txt").read_text().replace("tor", "mu")
    )
    lab.run([x.replace("text.txt", "text2.txt") for x in lab.prepare(other)])
    wrong = {
        "--n_layer 3": "n_layer 3", "--decoder cross": "decoder cross", "--seed 1": "seed 1",
        "--lr 1": "lr 1", "--mask_rate 0.3": "mask_rate 0.3", "--dropout 0": "dropout 0",
        f"--data {other}": "data", "--seq_len 30": "seq_len 30", "--batch_size 8": "batch_size 8",
    }  # fmt: skip
    survived = 0
    for more, word in wrong.items():
        before = (out / "ckpt.pt").read_bytes()
        status, _, err = lab.run(lab.train(out, more + " --max_steps 70"))
        survived += one_line(status, err, word) and (out / "ckpt.pt").read_bytes() == before
    row("going on with another field or data", len(wrong), survived, err.strip())
    status, text, _ = lab.run(lab.train(out, "--max_steps 70 --save_every 7 --log_every 5"))
    row(
        "going on with fields that may change",
        1,
        int(status == 0 and "warning: --max_steps" in text),
    )


# 9. Divergence


def diverge(lab, kills):
    for launcher, how in ((PYTHON, "1 process"), (TORCHRUN, "2 processes")):
        out = lab.new()
        more = "--lr 1e30 --warmup 1 --max_steps 600 --save_every 1"
        status, _, err = lab.run(lab.train(out, more, launcher))
        ours = [x for x in err.splitlines() if x.startswith("error: ")]
        state = torch.load(out / "ckpt.pt", weights_only=True)
        fine = all(torch.isfinite(p).all() for p in state["model"].values())
        good = len(ours) == 1 and "--grad_clip 1" in ours[0] and "lr" in ours[0] and fine
        row(f"divergence, {how}", 1, int(good and status != 0), ours[0] if ours else "")


# 10, 11. Bad and untrusted input: the tests' table


def bad_input(lab, kills):
    command = [*PYTHON, "-m", "pytest", "-q", "test_3ml.py", "-k", "bad_input or pickle or execute"]
    status, text, _ = lab.run(command)
    passed, failed = (
        int((re.findall(rf"(\d+) {w}", text) or [0])[0]) for w in ("passed", "failed")
    )
    row("bad and untrusted input (pytest's table)", passed + failed, passed)


# 12. The long haul


def haul(lab, kills):
    """20,000 steps of a minimal model: memory and speed, first tenth against last, and files."""
    out, steps = lab.new(), 20_000
    shape = (
        "--n_layer 1 --n_embd 32 --head_size 16 --batch_size 4 --micro_batch_size 4 --seq_len 16"
    )
    more = f"{shape} --max_steps {steps} --save_every 500 --eval_every 2000 --eval_rows 64"
    more += " --log_every 50"
    process = lab.start(lab.train(out, more))
    memory = []
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory.append((step_of(out), int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024))
        time.sleep(0.5)
    log = log_of(out)

    def ends(pairs):
        """Medians of the second and the last tenth; the first one has the start in it."""
        parts = [[v for s, v in pairs if a <= s / steps <= b] for a, b in ((0.1, 0.2), (0.9, 1))]
        return [statistics.median(x) for x in parts]

    rss, speed = ends(memory), ends([(e["step"], e["tokens_per_s"]) for e in log if "loss" in e])
    size = (out / "log.jsonl").stat().st_size
    lines = len(log)
    good = (
        process.returncode == 0 and rss[1] < 1.03 * rss[0] + 5 and speed[1] > 0.85 * speed[0]
        and lines == steps // 50 + steps // 2000 and math.isfinite(log[-1]["val_loss"])
    )  # fmt: skip
    row(
        f"{steps:,} steps", 1, int(good),
        f"memory {rss[0]:.0f} -> {rss[1]:.0f} MB, {speed[0]:,.0f} -> {speed[1]:,.0f} tokens/s, "
        f"log {size / 1e3:.0f} kB, checkpoint {(out / 'ckpt.pt').stat().st_size / 1e3:.0f} kB",
    )  # fmt: skip


SECTIONS = {
    "kill": kill, "world": world, "signal": signals, "rank": rank, "disk": disk, "damage": damage,
    "resume": resume, "diverge": diverge, "input": bad_input, "haul": haul,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", nargs="*", help="(default: all)")
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs at random (default: 30)")
    parser.add_argument("--log", help="where to keep what all runs printed")
    args = parser.parse_args()
    for name in args.section:
        if name not in SECTIONS:
            parser.error(f"{name}: choose from {', '.join(SECTIONS)}")
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(folder)
        for name in args.section or SECTIONS:
            SECTIONS[name](lab, args.kills)
        lab.log.seek(0)
        text = lab.log.read()
    if args.log:
        Path(args.log).write_text(text)
    ours = len(re.findall(r'File ".*/(?:train|data|model)\.py", line \d+, in main', text))
    row("runs of all these without a traceback of ours", 1, int(ours == 0), f"{ours} tracebacks")
    return 0 if all(tried == survived for _, tried, survived in TABLE) else 1


if __name__ == "__main__":
    sys.exit(main())
