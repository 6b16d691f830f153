#!/usr/bin/env bash
# Why does 3MLcross learn later than 3MLself? tiny with two layers of decoder and one thing changed, in NAME.jsonl.
# From the repository's root:
#     bash experiments/cross/run.sh NAME    NAME: shared_positions normalized_memory self_visible_from_encoder
#                                                 lr_1.4e-3 100-0-0 width_256
# Ours were stopped by hand after step 1,500 of 4,500. Unchanged: ../evidence/tiny/cross-50.0.jsonl, self-50.0.jsonl.
set -euo pipefail
name=$1
flags='--decoder cross'
case $name in
  self_*) flags='' ;;
  lr_*) flags+=' --lr 1.4e-3' ;;
  100-0-0) flags+=' --strategy 1 0 0' ;;
  width_256) flags+=' --n_embd_dec 256' ;;
esac
work=$(mktemp -d)
cp ./*.py "$work"
[[ -e experiments/cross/$name.patch ]] && (cd "$work" && git apply "$OLDPWD/experiments/cross/$name.patch")
OMP_NUM_THREADS=1 python "$work/train.py" --data "$PWD/data/python-docs" --out "$work/out" --n_layer_dec 2 --log_every 100 $flags
cp "$work/out/log.jsonl" "experiments/cross/$name.jsonl"
rm -r "$work"
