#!/usr/bin/env bash
# Does pre-training on English help at this scale? The README's encoder of "Your own text", trained on to twice its
# steps, and one with random weights, fine-tuned alike. Some two and a half hours of one core. The logged runs were made by
# these commands, one by one, with other names of folders (out/mine was out/pilot).
#     bash experiments/english/run.sh 'CORPUS_DIR/*.txt' GLUE_DIR TASKS_DIR     TASKS_DIR/mine: see README
set -euo pipefail
export OMP_NUM_THREADS=1
python data.py --input "$1" --vocab_size 4096 --out data/mine
train="python train.py --data data/mine --n_layer 6 --n_layer_dec 2 --seq_len 64 --lr 2e-3"
$train --out out/mine --max_steps 6000
$train --out out/mine --max_steps 12000
$train --out out/random --max_steps 1 --lr 0
for encoder in mine random; do
  to="--init out/$encoder/hf --out out/english/$encoder"
  python finetune.py --task SST-2 --glue "$2" $to --lr 3e-4 --epochs 1
  python finetune.py --task QQP --glue "$2" $to --lr 3e-4 --epochs 1
  python finetune.py --task STS-B --glue "$2" $to --lr 3e-4
  python finetune.py --task mine --glue "$3" $to --lr 1e-3
done
python finetune.py --task SST-2 --glue "$2" --init out/mine/hf --out out/english/mine --lr 1e-4 --epochs 1
