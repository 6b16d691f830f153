#!/usr/bin/env bash
# How the matrices of linear layers should start: the first command (tiny) with other scales than model.py's, one core
# each; with model.py's own, they are self-50, 1 layer, and vanilla-50 of ../evidence.py. From the repository's root:
#     bash experiments/init/run.sh NAME    NAME: bert small vanilla-bert
# It keeps the evaluations of each run in experiments/init/NAME.jsonl.
set -euo pipefail
name=$1
case $name in
  bert | vanilla-bert) linear='0.02' attention='0.02' ;;
  small)  # Nguyen and Salazar, 2019
    linear='(2 \/ (5 * min(module.weight.shape))) ** 0.5' attention='(2 \/ (5 * module.embed_dim)) ** 0.5' ;;
esac
flags=''
[[ $name == vanilla-* ]] && flags='--decoder none --mask_rate 0.5'
work=$(mktemp -d)
cp ./*.py "$work"
sed -i "s/0.02 \* (768 \/ module.in_features) \*\* 0.5/$linear/; s/0.02 \* (768 \/ module.embed_dim) \*\* 0.5/$attention/" "$work/model.py"
grep 'std=' "$work/model.py"
OMP_NUM_THREADS=1 python "$work/train.py" --data "$PWD/data/python-docs" --out "$work/out" $flags
grep val_loss "$work/out/log.jsonl" > "experiments/init/$name.jsonl"
rm -r "$work"
