# The presets on tasks that neither was trained on: sh docs/results/fast-elsewhere/make.sh DATA, a folder with one folder a task.
# Each run's table.md is kept here as TASK-PRESET.md.
set -eu
elsewhere() { # task, rows, its folder, network, adapted layers, name
    ephemera evaluate --config configs/evaluate-fast.yaml --set "data.task=$1" --set "data.limit=$2" --set "data.source=$3" \
        --set "methods=[none,layerwise]" --set "generate=[]" --set "layerwise=$4" --set "model.lora.layers=$5" --set "output=runs/$1-$6"
}
for task in xsum:60:xsum arc-easy:100:arc_easy snli:100:snli gsm8k:100:gsm8k openbookqa:100:openbookqa; do
    name=${task%%:*} rest=${task#*:}
    rows=${rest%%:*} folder=$1/${rest##*:}
    elsewhere "$name" "$rows" "$folder" scalenet-fast first-8 fast
    elsewhere "$name" "$rows" "$folder" scalenet-nq-open all full
done
# xsum-nq-open-fast.md came from a network that no longer ships (docs/log.md):
# elsewhere xsum 60 "$1/xsum" scalenet-nq-open-fast first-8 nq-open-fast
