#!/bin/sh
# DESIGN's 2 x 5 table: {zero, generated} start x {none, fixed, step-wise, layer-wise, averaged}, three tasks.
#   sh docs/results/both/make.sh DATA        (DATA/snli, DATA/arc_easy, DATA/openbookqa hold the rows; needs `make setup`)
# Each ScaleNet is trained on the three tasks from the start that it is used with; the joint run trains the generator too.
set -e
data=$1
ephemera=.venv/bin/ephemera
tasks="snli+arc-easy+openbookqa"
rows="--set train.task=$tasks --set train.split=train --set train.source=$data/{task} --set train.max_tokens=192 \
  --set validation.task=$tasks --set validation.split=validation --set validation.limit=8 --set validation.source=$data/{task}"
small="--set model.dtype=bfloat16 --set model.lora.r=2 --set model.lora.lora_alpha=8 --set scalenet.max_steps=1 \
  --set optimizer.samples=128 --set optimizer.batch_size=8 --set optimizer.warmup=5 --set validate_every=16 --set validation_steps=[1]"
for start in zero taskweaver; do
  rate=3; [ $start = zero ] || rate=0.3
  $ephemera train scalenet $rows $small --set init=$start --set "scalenet.base_rates=[$rate]" \
    --set optimizer.learning_rate=2e-3 --set output=runs/both/$start-layer
  $ephemera train scalenet $rows $small --set init=$start --set "scalenet.base_rates=[$rate]" --set scalenet.granularity=step \
    --set optimizer.learning_rate=3e-4 --set optimizer.clip_prompt=20 --set output=runs/both/$start-step
done
$ephemera train generator --set start=taskweaver --set model.dtype=bfloat16 --set train.source=$data/{task} \
  --set "train.tasks=[{task: snli}, {task: arc-easy}, {task: openbookqa}]" --set train.max_tokens=192 \
  --set validation.source=$data/{task} --set validation.limit=12 \
  --set "validation.tasks=[{task: snli}, {task: arc-easy}, {task: openbookqa}]" \
  --set "scalenet={max_steps: 1, base_rates: [0.3], learning_rate_factor: 100}" --set optimizer.samples=128 \
  --set optimizer.learning_rate=1e-5 --set optimizer.warmup=5 --set validate_every=16 --set output=runs/both/joint
for task in snli arc-easy openbookqa; do
  for start in zero taskweaver joint; do
    init=$start; layer=runs/both/$start-layer/network; step=runs/both/$start-step/network
    methods="[none,fixed,uniform,stepwise,layerwise,averaged,swapped]"
    if [ $start = joint ]; then
      init=runs/both/joint/network; layer=runs/both/joint/scalenet; step=runs/both/taskweaver-step/network
      methods="[none,layerwise,swapped]"
    fi
    $ephemera evaluate --set model.dtype=bfloat16 --set model.lora.r=2 --set model.lora.lora_alpha=8 --set init=$init \
      --set data.task=$task --set data.source=$data/{task} --set data.limit=32 \
      --set validation.task=$task --set validation.source=$data/{task} --set validation.limit=12 \
      --set "uniform_grid=[0.1,0.5,3]" --set "methods=$methods" --set "steps=[0,1]" --set "generate=[]" \
      --set layerwise=$layer --set stepwise=$step --set output=runs/both/evaluate-$start-$task
  done
done
.venv/bin/python -m benchmarks.both runs/both --output docs/results/both
