#!/usr/bin/env bash
# How the matrices of linear layers should start: the first command (tiny) with four scales, and vanilla
# MLM with two, one core each. From the repository's root, with data/python-docs prepared:
#     bash experiments/init/run.sh NAME    NAME: ours bert small xavier vanilla-ours vanilla-bert
# It keeps the evaluations of each run in experiments/init/NAME.jsonl.
set -euo pipefail
name=$1
case $name in
  ours | vanilla-ours) std='0.02 * (768 / module.in_features) ** 0.5' ;;
  bert | vanilla-bert) std='0.02' ;;
  small) std='(2 \/ (5 * min(module.weight.shape))) ** 0.5' ;;   # Nguyen and Salazar, 2019
  xavier) std='(2 \/ sum(module.weight.shape)) ** 0.5' ;;        # Glorot and Bengio, 2010
esac
flags=''
[[ $name == vanilla-* ]] && flags='--decoder none --mask_rate 0.15'
work=$(mktemp -d)
cp ./*.py "$work"
[[ $std == *module.in_features* ]] || sed -i "s/std=0.02 \* (768.*$/std=$std)/" "$work/model.py"
grep 'std=' "$work/model.py"
OMP_NUM_THREADS=1 python "$work/train.py" --data "$PWD/data/python-docs" --out "$work/out" --save_every 5000 $flags
grep val_loss "$work/out/log.jsonl" > "experiments/init/$name.jsonl"
rm -r "$work"
