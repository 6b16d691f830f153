#!/usr/bin/env bash
# Does pre-training on English help at this scale, and which kind of it? 3MLself-50% (the README's encoder of "Your own text",
# trained on to twice its steps) and vanilla MLM (84, 75 and 69 minutes), then fine-tuned beside random weights. Some fifteen
# hours of one core. The logged runs were made by these commands, one by one, with other names of folders.
#     bash experiments/english/run.sh 'CORPUS_DIR/*.txt' GLUE_DIR TASKS_DIR     TASKS_DIR/mine: see README
set -euo pipefail
export OMP_NUM_THREADS=1
python data.py --input "$1" --vocab_size 4096 --out data/mine
train="python train.py --data data/mine --n_layer 6 --n_layer_dec 2 --seq_len 64 --lr 2e-3"
$train --out out/self-50 --max_steps 6000
$train --out out/self-50 --max_steps 12000
$train --out out/vanilla-40 --decoder none --mask_rate 0.4 --max_steps 9000
$train --out out/vanilla-15 --decoder none --mask_rate 0.15 --max_steps 9000
$train --out out/random --max_steps 1 --lr 0
finetune() { python finetune.py --task "$2" --glue "$3" --init "out/$1/hf" --out "out/english/$1" --lr 3e-4 "${@:4}"; }
for encoder in random self-50 vanilla-40 vanilla-15; do
  finetune $encoder STS-B "$2" --seed 0 1 2
  finetune $encoder CoLA "$2" --seed 0 1 2
  finetune $encoder SST-2 "$2" --seed 0 1 2 --epochs 1
  finetune $encoder QQP "$2" --seed 0 1 2 --epochs 1
  finetune $encoder MNLI "$2" --seed 0 1 2 --epochs 1 --out "out/english/MNLI/$encoder"  # STS-B does not start from it
done
for encoder in random self-50 vanilla-40; do
  finetune $encoder CoLA "$2" --lr 1e-4
  finetune $encoder STS-B "$2" --lr 1e-4
done
for encoder in random self-50 vanilla-40 vanilla-15; do  # longer; where the table has fewer seeds or encoders, so had we
  finetune $encoder STS-B "$2" --lr 1e-4 --epochs 10 --seed 0 1 2
  finetune $encoder CoLA "$2" --lr 1e-4 --epochs 10
  finetune $encoder QQP "$2" --lr 1e-4 --epochs 5
  finetune $encoder MNLI "$2" --lr 1e-4 --epochs 5 --seed 0 1 --out "out/english/MNLI/$encoder"
done
python experiments/states.py out/self-50 out/vanilla-40 out/vanilla-15 --to experiments/english/states
git apply experiments/english/mean_pooling.patch  # the classifier reads the mean of the states, not that of <s>
for encoder in random self-50 vanilla-40; do
  finetune $encoder STS-B "$2" --lr 1e-4 --epochs 10 --out "out/english/mean/STS-B/$encoder"
  finetune $encoder MNLI "$2" --lr 1e-4 --epochs 5 --out "out/english/mean/MNLI/$encoder"
done
git apply --reverse experiments/english/mean_pooling.patch
finetune random mine "$3" --lr 1e-3
finetune self-50 mine "$3" --lr 1e-3
finetune self-50 SST-2 "$2" --lr 1e-4 --epochs 1 3
