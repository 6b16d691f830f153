export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true
mkdir -p /tmp/o; cp -r .dev/glue .dev/c /tmp/o/
T="python train.py --recipe efficient-large --data /tmp/o/c --n_layer 8 --n_embd 512 --mask_rate 0.4 --lr 2e-3 --batch_size 256 --micro_batch_size 256 --eval_every 1000 --save_every 2000 --log_every 200 --device cuda"
$T --max_steps 1 --compile no --out /tmp/o/shape > $OUT/shape.log 2>&1; tail -3 $OUT/shape.log
F="finetune.py --task all --glue /tmp/o/glue --lr 1e-4 --batch_size 32 --epochs 3 --seed 0 1 2"
(setsid torchrun --nproc_per_node 7 --master_port 29511 $F --init /tmp/o/shape/hf --reinit --out /tmp/o/ft_a > /tmp/o/ft_a.log 2>&1 &)
timeout 420 $T --max_steps 9000 --out /tmp/o/pre > $OUT/pre.log 2>&1; cut -c1-150 $OUT/pre.log | tail -42
(setsid torchrun --nproc_per_node 7 --master_port 29512 $F --init /tmp/o/pre/hf --out /tmp/o/ft_b > /tmp/o/ft_b.log 2>&1 &)
sleep 20; tail -5 /tmp/o/ft_a.log /tmp/o/ft_b.log | cut -c1-200
cp /tmp/o/ft_a.log /tmp/o/ft_a/results.json $OUT/; cp /tmp/o/pre/log.jsonl $OUT/pre.jsonl
