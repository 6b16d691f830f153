"""Kills and starves real runs, and compares their results with those of undisturbed runs.

    python experiments/faults.py                    all sections: about 25 minutes on two cores
    python experiments/faults.py kill --times 4     one section; the others: stop world exits disk

Prints how often each fault was tried and survived. To survive is to end with a checkpoint and an
exported encoder bit-identical to those of an undisturbed run, and the same log.jsonl but for
timings. `disk` mounts a small tmpfs, which needs root. What needs no real process to fail is in
test_3ml.py."""

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

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(tempfile.mkdtemp(prefix="faults"))
RUN = (
    "--n_layer 2 --n_embd 128 --head_size 32 --seq_len 32 --batch_size 16 --micro_batch_size 8 "
    "--log_every 1 --eval_every 9 --save_every 4 --max_steps 60 --dropout 0.1 --device cpu "
    "--dtype fp32"
)
FAILED = []


def row(what, tried, survived, seen=""):
    FAILED.extend([what] * (survived < tried))
    line = f"{what:<44}{tried:>4} tried {int(survived):>4} survived  {seen.strip()}"
    print(line.replace(str(FOLDER), ""), flush=True)


def new_folder():
    return Path(tempfile.mkdtemp(dir=FOLDER)) / "out"


def prepare(out):
    flags = f"--input {FOLDER}/text.txt --vocab_size 400 --out {out}"
    return [sys.executable, "data.py", *flags.split()]


def train(out, flags="", torchrun=""):
    launch = f"-m torch.distributed.run {torchrun} " if torchrun else ""
    return [
        sys.executable,
        *f"{launch}train.py {RUN} --data {FOLDER}/data --out {out} {flags}".split(),
    ]


train_two = partial(train, torchrun="--standalone --nproc_per_node 2")


def run(command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@cache
def undisturbed(command=train):
    out = new_folder()
    run(command(out)).check_returncode()
    return out


def resumes(out, command=train):
    """Whether the same command ends a run with the results of an undisturbed one."""
    for _ in range(300):  # a killed process takes a moment to disappear
        if not processes(out):
            break
        time.sleep(0.1)
    done = run(command(out))
    if done.returncode != 0:
        print(done.stderr)
        return False
    results = []
    for folder in (undisturbed(command), out):
        weights = (folder / "hf/model.safetensors").read_bytes()
        state = torch.load(folder / "ckpt.pt", weights_only=True)
        results.append([log_of(folder), weights, state])
    return equal(*results)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def log_of(out):
    """The different entries of a run's log.jsonl so far, without timings. Steps that were done
    again are in it twice, and a full disk leaves a part of a line."""
    path, entries = out / "log.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            entry = json.loads(line)
            for timing in ("tokens_per_s", "mfu"):
                entry.pop(timing, None)
            entries[json.dumps(entry)] = entry
    return list(entries.values())


def processes(folder):
    """Ids of the processes that have this folder among their arguments."""
    return [int(number) for number in run(["pgrep", "-f", str(folder)]).stdout.split()]


def start_until(condition, command, log=FOLDER / "log"):
    """Start a command and wait until the condition holds or the command has ended."""
    with open(log, "a") as f:  # a background shell ignores Ctrl-C, which the command would inherit
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=f, stderr=f, start_new_session=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    while process.poll() is None and not condition():
        time.sleep(0.001)
    return process


def killed(command, good, times, moment=lambda out: True):
    """Kill each of several runs up to three times, at the first such moment after a random time,
    until there were `times`. Returns (number of kills, number of those in runs that survived)."""
    tried, survived, rng = 0, 0, random.Random(1)
    for _ in range(3 * times):
        out, count = new_folder(), 0
        for _ in range(3 if tried < times else 0):
            after = time.monotonic() + rng.uniform(0.3, 4.0)
            process = start_until(
                lambda o=out, t=after: time.monotonic() > t and moment(o), command(out)
            )
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
        run(prepare(out))  # refused where data.py was killed behind its last write
        files = ("meta.json", "train.bin", "val.bin", "tokenizer.json")
        return all((out / x).read_bytes() == (FOLDER / "data" / x).read_bytes() for x in files)

    def evaluating(out):
        last = (log_of(out) or [dict(step=1)])[-1]
        return last["step"] % 9 == 0 and "val_loss" not in last

    few = max(1, args.times // 5)
    row("SIGKILL while preparing data", *killed(prepare, same_data, few))
    row("SIGKILL at random times", *killed(train, resumes, args.times))
    row("SIGKILL while evaluating", *killed(train, resumes, few, evaluating))
    for what, file in (("writing a checkpoint", "ckpt.pt.tmp"), ("exporting hf/", "hf/*.tmp")):
        found = killed(train, resumes, few, lambda out, file=file: any(out.glob(file)))
        row(f"SIGKILL while {what}", *found)
    found = killed(train_two, partial(resumes, command=train_two), few)
    row("SIGKILL of torchrun and its processes", *found)


def stop(args):
    """Ctrl-C and SIGTERM; a process of two that is killed."""
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")):
        for command, processes_ in ((train, 1), (train_two, 2)):
            out = new_folder()
            process = start_until(lambda o=out: len(log_of(o)) >= 12, command(out))
            # a terminal sends Ctrl-C to the whole process group
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            row(
                f"{name}, processes: {processes_}",
                1,
                process.wait(60) != 0 and resumes(out, command),
            )
    out = new_folder()
    process = start_until(lambda: len(log_of(out)) >= 10, train_two(out))
    os.kill(processes(out)[-1], signal.SIGKILL)
    row("a process of two is killed", 1, process.wait(60) != 0 and resumes(out, train_two))


def world(args):
    """Other numbers of processes give the same losses; so do two torchrun agents, which stop where
    only one has a checkpoint."""
    agent = "--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint localhost:29517"
    two_nodes, log = new_folder(), FOLDER / "disagree.log"
    nodes = [start_until(lambda: True, train(two_nodes, torchrun=agent)) for _ in range(2)]
    ended = [node.wait(200) == 0 for node in nodes]
    outs = undisturbed(), new_folder()
    nodes = [start_until(lambda: True, train(out, torchrun=agent), log) for out in outs]
    stopped = [node.wait(200) != 0 for node in nodes]
    said = "--data and --out differ between processes" in log.read_text()
    row("2 agents, one without the checkpoint: stop", 1, all(stopped) and said)
    changing = new_folder()
    for step, command in ((20, train), (40, train_two)):
        process = start_until(lambda s=step: len(log_of(changing)) >= s, command(changing))
        process.terminate()
        process.wait(60)
    run(train(changing)).check_returncode()
    for name, folder in (
        ("2 processes", undisturbed(train_two)),
        ("2 agents of torchrun", two_nodes if all(ended) else None),
        ("1 -> 2 -> 1 processes", changing),
    ):  # fmt: skip
        pairs = zip(log_of(undisturbed()), log_of(folder), strict=True)
        far = max(
            abs(a[key] - b[key]) for a, b in pairs for key in ("loss", "val_loss") if key in a
        )
        row(
            f"{name}: losses of 1 to 1e-4",
            1,
            far < 1e-4,
            f"largest difference of a loss: {far:.1e}",
        )


def exits(args):
    """Short runs of two processes, which must end with status 0."""
    done = [run(train_two(new_folder(), "--max_steps 2")).returncode for _ in range(args.runs)]
    row("runs of two processes, to their end", args.runs, done.count(0), f"{set(done)}")


def disk(args):
    where = FOLDER / "disk"
    where.mkdir()
    if run(f"mount -t tmpfs -o size=8m tmpfs {where}".split()).returncode:
        return row("a full disk", 0, 0, "no tmpfs can be mounted here")
    try:
        done = run(train(where / "out"))
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        good = done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr
        row("a full disk is one line", 1, good and not list(where.rglob("*.tmp")), errors[-1])
        subprocess.run(f"mount -o remount,size=100m {where}".split(), check=True)
        row("a resume after a full disk", 1, resumes(where / "out"))
    finally:
        subprocess.run(["umount", str(where)])


def main():
    sections = dict(kill=kill, stop=stop, world=world, exits=exits, disk=disk)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("section", nargs="*", help=f"{', '.join(sections)} (default: all)")
    parser.add_argument(
        "--times", type=int, default=30, help="SIGKILLs at random times (default: 30)"
    )
    parser.add_argument("--runs", type=int, default=50, help="of `exits` (default: 50)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    words = ["torka", "torlo", "munrest", "selka", "sel", "pa", "\n\n"]
    (FOLDER / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=240_000)))
    run(prepare(FOLDER / "data")).check_returncode()
    for name in args.section or sections:
        sections[name](args)
    shutil.rmtree(FOLDER)
    sys.exit(len(FAILED) > 0)


if __name__ == "__main__":
    main()
