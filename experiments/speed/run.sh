#!/usr/bin/env bash
# The logs in this folder: bash experiments/speed/run.sh OLD_CHECKOUT, on a machine that is otherwise idle.
# OLD_CHECKOUT is d2d95b0, the last version whose Transformer layers were written by hand.
set -euo pipefail
here=experiments/speed
python experiments/speed.py --warmup 2 --rounds 7 --against "$1" \
  --only hf-15 vanilla-15 self-50 "self-50 old" "self-50 malloc" > $here/base.log
python experiments/speed.py --shape tiny --batch 32 --rounds 40 --against "$1" \
  --only vanilla-15 self-50 "self-50 flash" "self-50 malloc" "self-50 old" > $here/tune_cpu.log
