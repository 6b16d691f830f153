#!/usr/bin/env bash
# What README.md here shows: random initialisation (a) against an encoder pre-trained on 88 MB of text (b).
#   bash experiments/glue/run.sh CORPUS_DIR GLUE_DIR       about 12 minutes on one H100
# The logged run had a time limit and stopped (by SIGTERM) after step 7,362 of 9,000; --eval_only exported it.
set -euo pipefail
python data.py --input "$1/*.txt" --out data/corpus
pretrain="python train.py --recipe efficient-large --data data/corpus --n_layer 8 --n_embd 512 --mask_rate 0.4
  --lr 2e-3 --batch_size 256 --micro_batch_size 256 --eval_every 1000 --save_every 2000 --log_every 200"
$pretrain --max_steps 9000 --out out/corpus
$pretrain --max_steps 1 --lr 0 --no-compile --out out/random # random weights
glue="python finetune.py --task all --glue $2 --lr 1e-4 --batch_size 32 --epochs 3 --seed 0 1 2"
$glue --init out/random/hf --out out/glue-a
$glue --init out/corpus/hf --out out/glue-b
