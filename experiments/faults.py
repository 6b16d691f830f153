"""Kills runs for real, as subprocesses, and holds what comes out against runs that were left alone.

    python experiments/faults.py [--kills 30]

Covers: SIGKILL of the whole process group at random moments of preparing data and of training
(steps, evaluation, checkpoints, export), the same with two processes under torchrun, and of
torchrun's agent alone; SIGTERM under torchrun; a second run on the same folder. Prints a table of
tried and survived.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PLAIN = [sys.executable, str(ROOT / "train.py")]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
SHAPE = (
    "--n_layer 2 --n_embd 128 --head_size 32 --seq_len 32 --batch_size 16 --micro_batch_size 8 "
    "--max_steps 60 --eval_every 9 --save_every 4 --log_every 1 --dropout 0.1 --device cpu"
).split()


def start(command, log):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env)


def kill_until_done(command, folder, kills, longest, log, seed, same, only_agent=False):
    """Runs in fresh folders, each killed -9 after a random time again and again till it finishes by
    itself, until `kills` have hit. Returns (hits, whether same(folder) held for every run)."""
    rng, hits, survived, trial = random.Random(seed), 0, True, 0
    while hits < kills:
        out = f"{folder}{trial}"
        trial += 1
        done = False
        while not done:
            process = start([x.replace("OUT", out) for x in command], log)
            try:
                process.wait(rng.uniform(0.5, longest))
                done = True
                survived &= process.returncode == 0
            except subprocess.TimeoutExpired:
                target = os.kill if only_agent else os.killpg
                target(process.pid, signal.SIGKILL)
                process.wait()
                time.sleep(3 if only_agent else 0.3)  # its workers notice
                hits += 1
        survived &= same(Path(out))
    return hits, survived


def any_left(group):
    """Whether a process of the group is alive."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k != "config")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_end(a, b):
    """Parameters and optimizer bit by bit, the log in all but timings, hf/ too."""
    states = [torch.load(x / "ckpt.pt", weights_only=True) for x in (a, b)]
    logs = [[json.loads(line) for line in (x / "log.jsonl").open()] for x in (a, b)]
    logs = [
        [{k: v for k, v in e.items() if k not in ("tokens_per_s", "mfu")} for e in x] for x in logs
    ]
    hf = [torch.load(x / "hf/pytorch_model.bin", weights_only=True) for x in (a, b)]
    return equal(*states) and logs[0] == logs[1] and equal(*hf)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    args = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        here = Path(folder)
        rng = random.Random(0)
        words = [
            f"{a}{b}" for a in ("tor", "mun", "sel", "pa") for b in ("ka", "lo", "min", "", "rest")
        ]
        lines = [" ".join(rng.choices(words, k=60)) for _ in range(4000)]
        (here / "text.txt").write_text("\n\n".join(lines))

        def prepare(out):
            text = f"--input {here}/text.txt --vocab_size 400 --out {out}"
            return [sys.executable, str(ROOT / "data.py"), *text.split()]

        def train(out, launcher=PLAIN[:1]):
            return [*launcher, PLAIN[1], "--data", str(here / "whole"), "--out", str(out), *SHAPE]

        def same_data(out):
            metas = [json.loads((x / "meta.json").read_text()) for x in (here / "whole", out)]
            return metas[0]["sha256"] == metas[1]["sha256"]

        start(prepare(here / "whole"), log).wait()
        start(train(here / "one"), log).wait()
        start(train(here / "two", TWO), log).wait()
        few = args.kills // 6
        one, two = (lambda out, x=x: same_end(here / x, out) for x in ("one", "two"))
        for name, command, kills, longest, same, agent in (
            ("SIGKILL, preparing data", prepare("OUT"), few, 2.5, same_data, False),
            ("SIGKILL, training", train("OUT"), args.kills, 6.0, one, False),
            ("SIGKILL, two processes", train("OUT", TWO), few, 9.0, two, False),
            ("SIGKILL, torchrun's agent", train("OUT", TWO), few, 9.0, two, True),
        ):
            folder = here / name.replace(" ", "-")
            table.append(
                (name, *kill_until_done(command, folder, kills, longest, log, 1, same, agent))
            )

        process = start(train(here / "term", TWO), log)
        while not (here / "term/ckpt.pt").exists():
            time.sleep(0.2)
        process.terminate()
        process.wait(60)
        time.sleep(1)
        clean = not any_left(process.pid)
        start(train(here / "term", TWO), log).wait()
        table.append(
            ("SIGTERM, no orphans, goes on", 1, clean and same_end(here / "two", here / "term"))
        )

        process = start(train(here / "locked"), log)
        while not (here / "locked/log.jsonl").exists():
            time.sleep(0.1)
        second = subprocess.run(train(here / "locked"), capture_output=True, text=True)
        process.wait()
        refused = second.returncode == 2 and "another process" in second.stderr
        table.append(
            ("a second run on one folder", 1, refused and same_end(here / "one", here / "locked"))
        )
        log.seek(0)
        errors = sum("Traceback" in line for line in log)
    print(f"{'what':<32}{'tried':>6}  survived")
    for name, tried, survived in table:
        print(f"{name:<32}{tried:>6}  {'yes' if survived else 'NO'}")
    print(f"tracebacks in the logs of all runs: {errors}")
    return 0 if all(ok for *_, ok in table) else 1


if __name__ == "__main__":
    sys.exit(main())
