"""Runs the study behind experiments/README.md: does 3ML keep its promise?

    python experiments/evidence.py --jobs 2                   two cores, some hours
    python experiments/evidence.py --only vanilla-15.0 self-50.0 --fine_tune
    python experiments/evidence.py --speed                    tokens/s of the contenders, in turns

Every run of RUNS is a `train.py` command in a process of its own, then, with --fine_tune, a
`finetune.py` command. What is finished is not run again, and an interrupted run resumes. Kept
under experiments/evidence/cpu are NAME.jsonl (the run's log: every evaluation, and its training
loss each 100 steps), NAME.glue.jsonl (the lines of finetune.py's results) and speed.json.
figures.py turns these files, and nothing else, into the tables and figures of the study."""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "experiments/evidence/cpu"
DATA, OUT, GLUE = "data/evidence", "out/evidence", ROOT / "data/glue"
STEPS, LONGER = 4500, 1.16  # LONGER: steps of self-50 in the seconds of one of vanilla-15's
COMMON = (
    f"--data {DATA} --n_layer 6 --n_embd 256 --n_layer_dec 2 --norm pre --dropout 0 --seq_len 64 "
    "--batch_size 32 --micro_batch_size 32 --lr 1e-3 --eval_every 500 --log_every 10"
)
VANILLA, SELF = "--decoder none --mask_rate", "--decoder self --mask_rate"
RUNS = {  # name: flags besides the common ones. The number after the dot is the seed.
    "lr-0.0005": f"{VANILLA} 0.15 --lr 0.0005",
    "lr-0.001": f"{VANILLA} 0.15 --lr 0.001",
    "lr-0.002": f"{VANILLA} 0.15 --lr 0.002",
    "lr-0.004": f"{VANILLA} 0.15 --lr 0.004",
    # the main question: at equal steps, at equal FLOPs, at equal seconds
    "vanilla-15.0": f"{VANILLA} 0.15",
    "self-50.0": f"{SELF} 0.5",
    "vanilla-15.1": f"{VANILLA} 0.15",
    "self-50.1": f"{SELF} 0.5",
    "self-50-longer.0": f"{SELF} 0.5",
    "self-50-longer.1": f"{SELF} 0.5",
    "vanilla-50.0": f"{VANILLA} 0.5",
    # what slows self-50: a narrow decoder, or late [MASK]s? In "early" one layer comes before them
    "self-50-full.1": f"{SELF} 0.5 --n_embd_dec 256",
    "self-50-early.1": f"{SELF} 0.5 --n_layer 1 --n_layer_dec 6 --n_embd_dec 256",
}


def command(script, flags, threads=1):
    argv = [sys.executable, ROOT / script, *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(argv, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def flags_of(name, steps=None):
    """The flags of a run for train.py, but for --out; later ones win."""
    seed = 0 if name.startswith("lr") else name.rpartition(".")[2]
    share = 0.133 if name.startswith("lr") else LONGER if "longer" in name else 1
    return f"{COMMON} --seed {seed} --max_steps {steps or round(STEPS * share)} {RUNS[name]}"


def pretrain(name):
    kept = KEPT / f"{name}.jsonl"
    if kept.exists():
        return
    command("train.py", f"{flags_of(name)} --out {OUT}/{name}")
    lines = [json.loads(x) for x in (ROOT / OUT / name / "log.jsonl").read_text().splitlines()]
    lines = [x for x in lines if "val_loss" in x or x["step"] == 1 or x["step"] % 100 == 0]
    kept.write_text("".join(json.dumps(x) + "\n" for x in lines))
    print(name, lines[-1], flush=True)


def fine_tune(name):
    """Three seeds of STS-B, from the encoder of a run."""
    kept, out = KEPT / f"{name}.glue.jsonl", f"{OUT}/{name}"
    if kept.exists():
        return
    flags = f"--task STS-B --glue {GLUE} --init {out}/hf --out {out}/glue --lr 1e-4 --seed 0 1 2"
    command("finetune.py", flags)
    kept.write_text((ROOT / out / "glue/STS-B/results.jsonl").read_text())


def measure_speed(rounds=4, steps=50):
    """Tokens/s of vanilla-15 and self-50 in short runs that take turns: {name: [of each round]}."""
    names, speeds = ("vanilla-15.0", "self-50.0"), {}
    for i in range(rounds):
        for name in names:
            out = f"{OUT}/speed-{name}-{i}"
            flags = f"{flags_of(name, steps)} --out {out} --eval_rows 1 --log_every {steps // 2}"
            command("train.py", flags)
            log = [json.loads(line) for line in (ROOT / out / "log.jsonl").read_text().splitlines()]
            last = [x["tokens_per_s"] for x in log if "tokens_per_s" in x][-1]
            speeds.setdefault(name, []).append(last)
    (KEPT / "speed.json").write_text(json.dumps(speeds))
    for name, x in speeds.items():
        ratios = [b / a for a, b in zip(speeds["vanilla-15.0"], x)]
        print(f"{name}: median {median(x):,.0f} tokens/s, {median(ratios):.3f} of vanilla-15's")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--fine_tune", action="store_true", help="also fine-tune the runs")
    parser.add_argument("--speed", action="store_true", help="measure tokens/s, run nothing else")
    args = parser.parse_args()
    if not (ROOT / DATA / "meta.json").exists():
        command("data.py", f"--val_every 20 --out {DATA}", threads=2)
    if args.speed:
        measure_speed()
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(pretrain, args.only))
        if args.fine_tune:
            list(pool.map(fine_tune, args.only))


if __name__ == "__main__":
    main()
