#!/usr/bin/env bash
# Whether two commits train alike: dev/compare.sh OLD NEW [FOLDER]
# Both are cloned, the same fixed runs are made by each on this machine (a CPU, fp32), and metrics.jsonl, rollouts.jsonl
# and the last weights are compared value by value (dev/compare.py). Stored results would be worthless: bits differ
# between processors. PYTHON names the interpreter, RUNS a subset of the runs.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
old=$1 new=$2 work=${3:-$(mktemp -d)}
python=$(realpath -s "${PYTHON:-$repo/.venv/bin/python}")
runs=${RUNS:-sft sft_cot sft_2ranks full grpo grpo_cot grpo_2ranks}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

mkdir -p "$work"
work=$(cd "$work" && pwd)
for commit in "$old" "$new"; do
    side=$([ "$commit" = "$old" ] && echo old || echo new)
    [ -d "$work/$side/.git" ] || git clone -q "$repo" "$work/$side"
    git -C "$work/$side" fetch -q origin
    git -C "$work/$side" checkout -q --detach "$(git -C "$repo" rev-parse "$commit")"
done
for kind in plain cot; do
    [ -e "$work/data_$kind/val.json" ] || (cd "$work/old" && $python generate.py --output_dir "$work/data_$kind" --num_samples 80 \
        --split 0.8 --overwrite $([ $kind = cot ] && echo --cot --cot_source trajectory --cot_coordinates 0) >"$work/data_$kind.log")
done

train() {  # side, name, script, processes, flags
    local side=$1 name=$2 script=$3 ranks=$4
    shift 4
    [ -e "$work/runs/$side/$name/done" ] && [ "$side" = old ] && return
    local launch=$python
    [ "$ranks" = 1 ] || launch="$python -m torch.distributed.run --standalone --nproc_per_node $ranks"
    echo "$side $name"
    (cd "$work/$side" && $launch "$script" --output_dir "$work/runs/$side/$name" --overwrite --dataloader_num_workers 1 \
        --eval_samples 8 --eval_controls 0 --save_steps 1000 --eval_steps 1000 --max_new_tokens 48 "$@") >"$work/$side.$name.log" 2>&1 \
        || { tail -5 "$work/$side.$name.log"; exit 1; }
    touch "$work/runs/$side/$name/done"
}

grpo="--per_device_train_batch_size 32 --max_completion_length 48 --learning_rate 1e-3 --max_steps 10"
for side in old new; do
    for name in $runs; do
        case $name in
            sft) train $side sft train_sft.py 1 --data_path "$work/data_plain/train.json" --per_device_train_batch_size 8 --max_steps 40 ;;
            sft_cot) train $side sft_cot train_sft.py 1 --data_path "$work/data_cot/train.json" --per_device_train_batch_size 8 --max_steps 40 ;;
            sft_2ranks) train $side sft_2ranks train_sft.py 2 --data_path "$work/data_plain/train.json" --per_device_train_batch_size 8 --max_steps 20 ;;
            full) train $side full train_sft.py 1 --data_path "$work/data_plain/train.json" --per_device_train_batch_size 8 --max_steps 5 \
                --lora_enable False --freeze_llm False --learning_rate 1e-4 ;;
            grpo) train $side grpo train_grpo.py 1 --data_path "$work/data_plain/train.json" --model_ckpt "$work/runs/old/sft" $grpo ;;
            grpo_cot) train $side grpo_cot train_grpo.py 1 --data_path "$work/data_cot/train.json" --model_ckpt "$work/runs/old/sft_cot" $grpo ;;
            grpo_2ranks) train $side grpo_2ranks train_grpo.py 2 --data_path "$work/data_plain/train.json" --model_ckpt "$work/runs/old/sft" \
                $grpo --per_device_train_batch_size 16 ;;
        esac
    done
done
$python "$repo/dev/compare.py" "$work/runs" $runs
