"""Runs the study behind experiments/README.md: does 3ML keep its promise?

    python experiments/evidence.py --setting cpu --jobs 2       two cores, some hours
    python experiments/evidence.py --setting gpu --fine_tune    one GPU, some twenty minutes for claim 1
    python experiments/evidence.py --setting cpu --only vanilla-15.0 self-50.0
    python experiments/evidence.py --setting cpu --speed        tokens/s of the contenders, in turns

Every run of the table RUNS is a `train.py` command in a process of its own, then, with --fine_tune, a
`finetune.py` command. What is finished is not run again, and an interrupted run resumes. Kept under
experiments/evidence/SETTING/ are NAME.jsonl (the run's log: every evaluation, and its training loss each 100
steps), NAME.glue.jsonl (the lines of finetune.py's results) and speed.json. figures.py turns these files, and
nothing else, into the tables and figures of the study.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
GLUE = ROOT / "data/glue"  # GLUE's folders; the English text of the GPU's setting is data/corpus/*.txt

# What the runs of a setting share: text, shape, schedule. The learning rate is vanilla-15's best of the short
# runs called "lr". longer: the steps of self-50 in the seconds of one of vanilla-15's, from speed.json.
SETTINGS = {
    "cpu": dict(
        text="--val_every 20", steps=4500, lr=1e-3, longer=1.16, threads=1,
        tasks=("STS-B",), quarter=64, full=256,
        shape="--n_layer 6 --n_embd 256 --norm pre --dropout 0 --seq_len 64 --batch_size 32",
    ),
    "gpu": dict(
        text="--input data/corpus/*.txt --vocab_size 8192", steps=7500, lr=1e-3, longer=1.25,
        tasks=("CoLA", "SST-2", "QQP", "MNLI", "RTE", "MRPC", "STS-B"),  # of QQP and MNLI, subsets
        threads=16, quarter=128, full=512,
        shape="--n_layer 8 --n_embd 512 --norm pre --seq_len 128 --batch_size 256 --micro_batch_size 256",
    ),
}  # fmt: skip
EVERY = "--eval_every 500 --save_every 500 --log_every 10"

VANILLA, SELF, CROSS = (
    "--decoder none --mask_rate",
    "--decoder self --mask_rate",
    "--decoder cross --mask_rate",
)
RUNS = {  # name: flags besides the setting's. The number after the dot is the seed.
    "lr-0.0005": f"{VANILLA} 0.15 --lr 0.0005",
    "lr-0.001": f"{VANILLA} 0.15 --lr 0.001",
    "lr-0.002": f"{VANILLA} 0.15 --lr 0.002",
    "lr-0.004": f"{VANILLA} 0.15 --lr 0.004",
    "lr-self-0.0005": f"{SELF} 0.5 --lr 0.0005",
    "lr-self-0.001": f"{SELF} 0.5 --lr 0.001",
    "lr-self-0.002": f"{SELF} 0.5 --lr 0.002",
    # the main question: at equal steps, at equal FLOPs, at equal seconds
    "vanilla-15.0": f"{VANILLA} 0.15",
    "self-50.0": f"{SELF} 0.5",
    "vanilla-15.1": f"{VANILLA} 0.15",
    "self-50.1": f"{SELF} 0.5",
    "self-50-longer.0": f"{SELF} 0.5",
    "self-50-longer.1": f"{SELF} 0.5",
    "self-40.0": f"{SELF} 0.4",
    "cross-40.0": f"{CROSS} 0.4",
    # mask more (Figure 3)
    "vanilla-25.0": f"{VANILLA} 0.25",
    "vanilla-40.0": f"{VANILLA} 0.4",
    "vanilla-50.0": f"{VANILLA} 0.5",
    # strategy (Table 2c)
    "self-40-100-0-0.0": f"{SELF} 0.4 --strategy 1 0 0",
    "self-40-80-20-0.0": f"{SELF} 0.4 --strategy 0.8 0.2 0",
    "self-40-80-0-20.0": f"{SELF} 0.4 --strategy 0.8 0 0.2",
    # depth and width of the decoder (Tables 2a, 2b)
    "self-40-1-layer.0": f"{SELF} 0.4 --n_layer_dec 1",
    "self-40-4-layers.0": f"{SELF} 0.4 --n_layer_dec 4",
    "self-40-quarter.0": f"{SELF} 0.4 --n_embd_dec quarter",
    "self-40-full.0": f"{SELF} 0.4 --n_embd_dec full",
    # what slows self-50: a narrow decoder, or late [MASK]s? In "early" one layer comes before them
    "self-50-full.1": f"{SELF} 0.5 --n_embd_dec full",
    "self-50-early.1": f"{SELF} 0.5 --n_layer 1 --n_layer_dec 6 --n_embd_dec full",
    # norm (section 3.3)
    "self-40-post.0": f"{SELF} 0.4 --norm post",
    "cross-40-post.0": f"{CROSS} 0.4 --norm post",
}


def command(script, flags, threads):
    argv = [sys.executable, ROOT / script, *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(argv, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def flags_of(name, setting, steps=None):
    """The flags of a run for train.py, but for --out; later ones win."""
    s, seed = SETTINGS[setting], name.rpartition(".")[2] if not name.startswith("lr") else 0
    share = 0.133 if name.startswith("lr") else s["longer"] if "longer" in name else 1
    steps = steps or round(s["steps"] * share)
    common = f"{s['shape']} {EVERY} --lr {s['lr']} --seed {seed} --max_steps {steps}"
    own = RUNS[name].replace("quarter", str(s["quarter"])).replace("full", str(s["full"]))
    return f"--data data/evidence-{setting} {common} {own}"


def pretrain(name, setting, kept):
    if kept.exists():
        return
    out = f"out/evidence-{setting}/{name}"
    command("train.py", f"{flags_of(name, setting)} --out {out}", SETTINGS[setting]["threads"])
    lines = [json.loads(line) for line in (ROOT / out / "log.jsonl").read_text().splitlines()]
    lines = [x for x in lines if "val_loss" in x or x["step"] == 1 or x["step"] % 100 == 0]
    kept.write_text("".join(json.dumps(x) + "\n" for x in lines))
    print(name, lines[-1], flush=True)


def fine_tune(name, setting, kept):
    """Three seeds of each task, from the encoder of a run."""
    if kept.exists() or name.startswith("lr"):
        return
    out = f"out/evidence-{setting}/{name}"
    flags = f"--task all --glue data/glue-{setting} --init {out}/hf --out {out}/glue --lr 1e-4 --seed 0 1 2"
    command("finetune.py", flags, SETTINGS[setting]["threads"])
    kept.write_text((ROOT / out / "glue/results.jsonl").read_text())


def copy_glue(setting):
    """GLUE's files as they are here, SST-2 with its first 10,000 rows."""
    for task in SETTINGS[setting]["tasks"]:
        folder = ROOT / f"data/glue-{setting}" / task
        folder.mkdir(parents=True, exist_ok=True)
        for file in (GLUE / task).glob("*.tsv"):
            lines = file.read_text().split("\n")
            some = lines[:10_001] if (task, file.name) == ("SST-2", "train.tsv") else lines
            (folder / file.name).write_text("\n".join(some))


def measure_speed(setting, folder, rounds=4, steps=50):
    """Tokens/s of vanilla-15 and self-50 in short runs that take turns: {name: [of each round]}."""
    names, speeds = ("vanilla-15.0", "self-50.0"), {}
    for i in range(rounds):
        for name in names:
            out = f"out/evidence-{setting}/speed-{name}-{i}"
            flags = f"{flags_of(name, setting, steps)} --out {out} --eval_rows 1 --log_every {steps // 2}"
            command("train.py", flags, SETTINGS[setting]["threads"])
            log = [json.loads(line) for line in (ROOT / out / "log.jsonl").read_text().splitlines()]
            speeds.setdefault(name, []).append([x["tokens_per_s"] for x in log if "tokens_per_s" in x][-1])
            print(name, speeds[name], flush=True)
    (folder / "speed.json").write_text(json.dumps(speeds))
    for name, x in speeds.items():
        ratios = [b / a for a, b in zip(speeds["vanilla-15.0"], x)]
        print(f"{name}: median {median(x):,.0f} tokens/s, {median(ratios):.3f} of vanilla-15's")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--fine_tune", action="store_true", help="also fine-tune every run on GLUE's tasks")
    parser.add_argument("--speed", action="store_true", help="measure tokens/s, run nothing else")
    args = parser.parse_args()
    folder = ROOT / "experiments/evidence" / args.setting
    folder.mkdir(parents=True, exist_ok=True)
    if not (ROOT / f"data/evidence-{args.setting}/meta.json").exists():
        command("data.py", f"{SETTINGS[args.setting]['text']} --out data/evidence-{args.setting}", 2)
    if args.speed:
        measure_speed(args.setting, folder)
        return
    if args.fine_tune:
        copy_glue(args.setting)

    def one_run(name):
        pretrain(name, args.setting, folder / f"{name}.jsonl")
        if args.fine_tune:
            fine_tune(name, args.setting, folder / f"{name}.glue.jsonl")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one_run, args.only))


if __name__ == "__main__":
    main()
