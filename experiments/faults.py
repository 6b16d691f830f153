"""Kills, interrupts and damages real runs, and compares their results with those of undisturbed runs.

    python experiments/faults.py                       all sections: about 25 minutes on two cores
    python experiments/faults.py kill --kills 4        one section; the others: world signal rank disk
                                                       damage resume diverge haul

Prints how often each kind of fault was tried and survived. `disk` mounts a small tmpfs, which needs root. To
survive is to end with parameters, optimizer state and exported encoder bit-identical to those of an
undisturbed run, and the same log.jsonl but for timings. The exit status is 1 if anything was not survived."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(tempfile.mkdtemp(prefix="faults"))
RUN = (
    "--n_layer 2 --n_embd 128 --head_size 32 --seq_len 32 --batch_size 16 --micro_batch_size 8 --log_every 1 "
    "--eval_every 9 --save_every 4 --max_steps 60 --dropout 0.1 --device cpu --dtype fp32"
)
DIFFER = {"tokens_per_s", "mfu", "log_bytes"}  # what may differ between two runs
FAILED = []


def row(what, tried, survived, seen=""):
    FAILED.extend([what] * (survived < tried))
    line = f"{what:<42}{tried:>4} tried {int(survived):>4} survived  {seen.strip()}"
    print(line.replace(str(FOLDER), ""), flush=True)


def new_folder():
    return Path(tempfile.mkdtemp(dir=FOLDER)) / "out"


def prepare(out, val_every=10):
    flags = f"--input {FOLDER}/text.txt --vocab_size 400 --val_every {val_every} --out {out}"
    return [sys.executable, "data.py", *flags.split()]


def train(out, flags="", workers=1, data=FOLDER / "data"):
    torchrun = f"-m torch.distributed.run --nproc_per_node {workers} " if workers > 1 else ""
    return [sys.executable, *f"{torchrun}train.py {RUN} --data {data} --out {out} {flags}".split()]


def run(command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def is_refused(what, command, *words):
    """Prints the row of a command that must end with exit status 2 and one line that has all the words."""
    done = run(command)
    one_line = done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    row(what, 1, one_line and all(word in done.stderr for word in words), done.stderr)


@cache
def undisturbed(workers=1):
    out = new_folder()
    run(train(out, workers=workers)).check_returncode()
    return out


def resumes(out, workers=1):
    """Whether the same command ends a run, or did so before, with the results of an undisturbed one."""
    start = time.monotonic()
    while processes(out) and time.monotonic() < start + 30:  # a killed process takes a moment to disappear
        time.sleep(0.1)
    if processes(out) or run(train(out, workers=workers)).returncode != 0:
        return False
    results = []
    for folder in (undisturbed(workers), out):
        files = (folder / "ckpt.pt", folder / "hf/pytorch_model.bin")
        results.append([log_of(folder), *(torch.load(file, weights_only=True) for file in files)])
    return equal(*results)


def equal(a, b):
    """Whether two states are equal, tensors bit by bit, except for timings and the length of the log."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a.keys() - DIFFER)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def log_of(out):
    """The entries of a run's log.jsonl so far, one or two for each step."""
    path = out / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def processes(folder):
    """Ids of the processes that have this folder among their arguments."""
    return [int(number) for number in run(["pgrep", "-f", str(folder)]).stdout.split()]


def start_until(condition, command, log=FOLDER / "log"):
    """Start a command and wait until the condition holds or the command has ended."""
    with open(log, "a") as f:
        process = subprocess.Popen(command, cwd=ROOT, stdout=f, stderr=f, start_new_session=True)
    while process.poll() is None and not condition():
        time.sleep(0.001)
    return process


def killed(command, good, kills, moment=lambda out: True):
    """Kill each of several runs up to three times, at the first such moment after a random time, until there
    were `kills`. Returns (number of kills, number of those in runs that survived)."""
    tried, survived, rng = 0, 0, random.Random(1)
    for _ in range(3 * kills):
        out, count = new_folder(), 0
        for _ in range(3 if tried < kills else 0):
            after = time.monotonic() + rng.uniform(0.3, 4.0)
            process = start_until(lambda o=out, t=after: time.monotonic() > t and moment(o), command(out))
            count += process.poll() is None
            process.kill()
            for number in processes(out):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            process.wait()
        tried += count
        survived += count * (count > 0 and good(out))
    return tried, survived


def kill(args):
    def same_data(out):
        run(prepare(out))  # refused where data.py was killed after its last write
        same = (out / "meta.json").read_bytes() == (FOLDER / "data/meta.json").read_bytes()
        return same and run([sys.executable, "data.py", "--verify", out]).returncode == 0

    def evaluating(out):
        last = (log_of(out) or [dict(step=1)])[-1]
        return last["step"] % 9 == 0 and "val_loss" not in last

    few = max(1, args.kills // 5)
    row("SIGKILL while preparing data", *killed(prepare, same_data, few))
    row("SIGKILL at random times", *killed(train, resumes, args.kills))
    row("SIGKILL while evaluating", *killed(train, resumes, few, evaluating))
    for what, file in (("writing a checkpoint", "ckpt.new.pt.tmp"), ("exporting hf/", "hf/*.tmp")):
        found = killed(train, resumes, few, lambda out, file=file: any(out.glob(file)))
        row(f"SIGKILL while {what}", *found)
    found = killed(partial(train, workers=2), partial(resumes, workers=2), few)
    row("SIGKILL of torchrun and its processes", *found)


def world(args):
    out = new_folder()
    for step, workers in ((20, 1), (40, 2)):
        with start_until(lambda s=step: len(log_of(out)) >= s, train(out, workers=workers)) as process:
            process.terminate()
    assert 30 <= log_of(out)[-1]["step"] < 60 and run(train(out)).returncode == 0
    for name, folder in (("2 processes", undisturbed(2)), ("1 -> 2 -> 1 processes", out)):
        pairs = zip(log_of(undisturbed()), log_of(folder), strict=True)
        far = max(abs(a[key] - b[key]) for a, b in pairs for key in ("loss", "val_loss") if key in a)
        row(f"{name}: losses of 1 to 1e-4", 1, far < 1e-4, f"largest difference of a loss: {far:.1e}")


def signals(args):
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")):
        for workers in (1, 2):
            count, good = max(1, args.kills // 10), 0
            for i in range(count):
                out = new_folder()
                log = out.parent / "log"
                at, command = 7 + 5 * i, train(out, workers=workers)
                process = start_until(lambda o=out, at=at: len(log_of(o)) >= at, command, log)
                # a terminal sends Ctrl-C to the whole process group
                (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
                status, text = process.wait(60), log.read_text()
                right = status == 128 + number if workers == 1 else status != 0
                said = text.count("the same command resumes the run") == 1 and 'train.py", line' not in text
                good += right and said and resumes(out, workers)
            row(f"{name}, processes: {workers}", count, good)


def rank(args):
    out = new_folder()
    process = start_until(lambda: len(log_of(out)) >= 10, train(out, workers=2))
    os.kill(processes(out)[-1], signal.SIGKILL)
    row("a process of two is killed", 1, process.wait(60) != 0 and resumes(out, 2))


def disk(args):
    where = FOLDER / "disk"
    where.mkdir()
    if run(f"mount -t tmpfs -o size=14m tmpfs {where}".split()).returncode:
        return row("a full disk, a read-only disk", 0, 0, "no tmpfs can be mounted here")
    try:
        is_refused("a full disk", train(where / "out"), "ckpt.new.pt", "full")
        subprocess.run(f"mount -o remount,size=100m {where}".split(), check=True)
        row("a resume after a full disk", 1, resumes(where / "out"))
        subprocess.run(f"mount -o remount,ro {where}".split(), check=True)
        is_refused("a read-only disk", train(where / "new"), str(where))
    finally:
        subprocess.run(["umount", str(where)])


def damaged(folder, how, *names):
    """A copy of a folder with some of its files cut, torn, or with one bit flipped."""
    copy = shutil.copytree(folder, new_folder())
    for name in names:
        content = bytearray((copy / name).read_bytes())
        at = len(content) * 2 // 3
        content[at] ^= 4 if how == "flip" else 0
        (copy / name).write_bytes(content[:at] if how == "cut" else content + b"{" * (how == "torn"))
    return copy


def damage(args):
    half, data = new_folder(), FOLDER / "data"
    with start_until(lambda: len(log_of(half)) >= 30, train(half)) as process:
        process.kill()
    for case in ("ckpt.pt cut", "ckpt.pt flip", "ckpt.prev.pt flip", "log.jsonl torn"):
        name, how = case.split()
        out = damaged(half, how, name)
        warnings = [line for line in run(train(out)).stdout.splitlines() if "warning" in line]
        row(case, 1, len(warnings) == (name == "ckpt.pt") and resumes(out), "".join(warnings))
    out = damaged(half, "cut", "ckpt.pt", "ckpt.prev.pt")
    is_refused("both checkpoints cut", train(out), "ckpt.pt", "ckpt.prev.pt")
    for name in ("train.bin", "meta.json"):
        command = train(new_folder(), data=damaged(data, "cut", name))
        is_refused(f"{name} cut, found at the start", command, name)
    for name in ("train.bin", "meta.json", "tokenizer.json"):  # in meta.json, a checksum is changed
        command = [sys.executable, "data.py", "--verify", damaged(data, "flip", name)]
        is_refused(f"{name} flip, found by --verify", command, "not what data.py wrote")


def resume(args):
    out, other = new_folder(), new_folder()
    with start_until(lambda: len(log_of(out)) >= 10, train(out)):  # and then until it ends
        is_refused("a second run in one folder", train(out), "another process")
    run(prepare(other, val_every=20))
    checkpoint = (out / "ckpt.pt").read_bytes()
    for flag, words in (
        ("n_layer 3", "n_layer 2, not 3"), ("decoder cross", "decoder self, not cross"),
        ("seed 1", "seed 0, not 1"), ("mask_rate 0.3", "mask_rate 0.5, not 0.3"),
        ("batch_size 8", "batch_size 16, not 8"), (f"data {other}", "data (SHA-256)"),
    ):  # fmt: skip
        is_refused(f"a resume with other {flag.split()[0]}", train(out, f"--{flag} --max_steps 70"), words)
    row("the run after these refusals", 1, (out / "ckpt.pt").read_bytes() == checkpoint and resumes(out))
    run(train(out, "--max_steps 70 --save_every 7 --log_every 5"))
    row("a resume with settings that may change", 1, log_of(out)[-1]["step"] == 70)


def diverge(args):
    for workers in (1, 2):
        out, flags = new_folder(), "--lr 1e30 --warmup 1 --max_steps 600 --save_every 1"
        lines = run(train(out, flags, workers)).stderr.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        model = torch.load(out / "ckpt.pt", weights_only=True)["model"]
        good = "--grad_clip 1" in "".join(errors) and all(p.isfinite().all() for p in model.values())
        row(f"divergence, processes: {workers}", 1, good, "".join(errors))


def haul(args):
    """Many steps of a minimal model: memory and speed in the second tenth and in the last one."""
    out, steps, memory = new_folder(), args.haul_steps, []
    flags = "--n_layer 1 --n_embd 32 --head_size 16 --batch_size 4 --micro_batch_size 4 --seq_len 16"
    flags += f" --max_steps {steps} --log_every 50 --save_every 500 --eval_every 2000 --eval_rows 64"
    process = start_until(lambda: len(log_of(out)) >= 1, train(out, flags))
    while process.poll() is None:
        time.sleep(0.2)
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        memory += [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")]
    log = log_of(out)
    speed = [entry["tokens_per_s"] for entry in log if "loss" in entry]
    parts = [[x[len(x) // 10 : len(x) // 5], x[-len(x) // 10 :]] for x in (memory, speed)]
    (mb, mb_end), (rate, rate_end) = (map(median, part) for part in parts)
    complete = process.returncode == 0 and len(log) == 1 + steps // 50 + steps // 2000
    good = complete and mb_end < 1.03 * mb + 5 and rate_end > 0.85 * rate
    seen = f"memory {mb:.0f} -> {mb_end:.0f} MB, speed {rate:,.0f} -> {rate_end:,.0f} tokens/s"
    row(f"{steps:,} steps", 1, good, seen)


def main():
    sections = dict(kill=kill, world=world, signal=signals, rank=rank, disk=disk)
    sections |= dict(damage=damage, resume=resume, diverge=diverge, haul=haul)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("section", nargs="*", help=f"{', '.join(sections)} (default: all)")
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs at random times (default: 30)")
    parser.add_argument("--haul_steps", type=int, default=20_000, help="a multiple of 2000 (default: 20000)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    words = random.Random(0).choices(["torka", "torlo", "munrest", "selka", "sel", "pa", "\n\n"], k=240_000)
    (FOLDER / "text.txt").write_text(" ".join(words))
    run(prepare(FOLDER / "data")).check_returncode()
    for name in args.section or sections:
        sections[name](args)
    shutil.rmtree(FOLDER)
    sys.exit(len(FAILED) > 0)


if __name__ == "__main__":
    main()
