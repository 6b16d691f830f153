#!/usr/bin/env bash
# The logs in this folder: bash experiments/speed/run.sh OLD_CHECKOUT, on a machine that is otherwise idle.
# OLD_CHECKOUT is 3968edd with one line more in its experiments/speed.py, the shape base-no-dropout.
set -euo pipefail
here=experiments/speed
speed="python experiments/speed.py --warmup 2 --rounds 7"
$speed --shape base-no-dropout --against "$1" --only "self-50 old" self-50 > $here/old.log
$speed --shape base-no-dropout --against "$1" --only "vanilla-15 old" vanilla-15 >> $here/old.log
$speed --only hf-15 vanilla-15 self-50 > $here/base.log
$speed --only vanilla-15 self-40 cross-40 >> $here/base.log
python experiments/speed.py --shape tiny --batch 32 --rounds 40 \
  --only vanilla-15 self-50 "self-50 flash" "self-50 malloc" > $here/tune_cpu.log
$speed --only self-50 "self-50 malloc" >> $here/tune_cpu.log
# tiny.log: the first command and vanilla MLM, four pairs of runs of 200 steps that take turns, as
#   python train.py [--decoder none --mask_rate 0.15] --max_steps 200 --eval_every 1000 --log_every 20
