#!/bin/sh
# Table 2 with LoRAs for single tasks (1,000 rows each) and steps from the generated start (640 rows).
#   sh docs/results/taskweaver-steps/make.sh DATA        (DATA/snli, DATA/arc_easy, ... hold the rows; needs `make setup`)
# The committed table was evaluated in two processes, whose records were joined; hellaswag's own LoRA did not fit in its time.
set -e
data=$1
ephemera=.venv/bin/ephemera
for task in snli arc-easy arc-challenge boolq openbookqa winogrande; do
  folder=$(echo $task | tr - _) # what {task} stands for below
  $ephemera train lora --config configs/task-lora.yaml --set "train.tasks=[{task: $task}]" \
    --set "validation.tasks=[{task: $task}]" --set "train.source=$data/{task}" --set "validation.source=$data/{task}" \
    --set optimizer.samples=1000 --set optimizer.warmup=10 --set output=runs/task-lora/$folder
done
$ephemera train scalenet --config configs/taskweaver-scalenet.yaml --set "train.source=$data/{task}" \
  --set "validation.source=$data/{task}"
$ephemera benchmark --config configs/benchmark.yaml --set "data.source=$data/{task}" --set output=runs/benchmark-steps \
  --set "data.tasks=[{task: snli},{task: arc-easy},{task: arc-challenge},{task: boolq},{task: openbookqa},{task: winogrande},{task: hellaswag}]" \
  --set 'variants=[{name: Base}, {name: + LoRA FT individual, init: "runs/task-lora/{task}/adapter", tasks: [snli, arc-easy, arc-challenge, boolq, openbookqa, winogrande]}, {name: + Hypernet, init: taskweaver}, {name: + Hypernet + ScaleNet, init: taskweaver, rate: runs/taskweaver-scalenet/network, steps: 1}]' \
  --set 'against=[Base, + Hypernet]'
# GSM8K, whose answers are long, on 32 rows: gsm8k.md
$ephemera benchmark --config configs/benchmark.yaml --set "data.source=$data/{task}" --set output=runs/gsm8k-steps \
  --set data.limit=32 --set "data.tasks=[{task: gsm8k}]" --set 'against=[Base, + Hypernet]' \
  --set 'variants=[{name: Base}, {name: + Hypernet, init: taskweaver}, {name: + Hypernet + ScaleNet, init: taskweaver, rate: runs/taskweaver-scalenet/network, steps: 1}]'
