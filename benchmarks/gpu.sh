#!/bin/bash
# Check mae-et on a GPU and measure it, within a few minutes:
#
#     DATA=/path/to/data benchmarks/gpu.sh OUT [MINUTES=8]
#
# Writes to OUT, in this order:
#     goals.md      the goals, what was measured, and whether it meets them; written first, and again after each part
#     run.json      rows of short runs of the headline recipe: speed and wait for data, as it is and in variants
#                   (benchmarks/variants.py, most of them after the tests)
#     node.json     `mae-et bench node`: speeds beside a plain reference, hours of the headline recipe;
#                   node.partial.json if it did not end
#     tests.jsonl   results of the tests of `make test-gpu`, each as it ends
#     quality.json  accuracy of arms, one after another, with their images in memory
#     state.tar     the arms' runs, to resume from
#     log.txt       output of the commands
# Each of them but tests.jsonl and log.txt is complete or absent, also if this script is killed.
# Call it again with the same OUT to produce absent files, repeat runs that did not end and tests that did not pass, and
# resume the arms. Sized for one GPU with 16 cores: a call of 8 minutes should reach the tests.
#
# DATA: folder with imagenet_sample/all and imagenette128/{train,val}. Without the first, node generates its images,
# and the runs are skipped; without the second, arms are skipped. DATA= (empty) has neither.
# ARMS: names in benchmarks/arms.py. PYTHON: the interpreter. SMOKE=1: all of it on a CPU, at a tiny size, without DATA.
set -u
out=${1:?usage: benchmarks/gpu.sh OUT [MINUTES]}
minutes=${2:-8}
[[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "gpu.sh: MINUTES is a whole number, got $minutes" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
if [ -z "${SMOKE:-}" ]; then
  data=${DATA?gpu.sh: set DATA to the folder of the data sets, or to nothing (DATA=) to generate images and skip the arms}
  [ -z "$data" ] || data=$(cd "$data" && pwd) || exit 2
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
work=${TMPDIR:-/tmp}/gpu-$(cksum <<<"$out" | cut -d' ' -f1) # the same for each call: runs record their data's path
rm -rf "$work"
mkdir -m 700 "$work" || exit 2
cd "$root" || exit 2
# As if installed, with benchmarks and configs inside the package: `mae-et bench` needs them there.
mkdir "$work/site" && cp -r mae_et finetune slurm "$work/site" && cp -r benchmarks configs "$work/site/mae_et" || exit 2
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
ends=$((SECONDS + minutes * 60 - 15)) # the rest is for packing

if [ -n "${SMOKE:-}" ]; then
  device=cpu recipe=$root/benchmarks/imagenette64.yaml epochs=8 node_seconds=20
  arms=${ARMS:-"plain etpp"}
  tiny='--model.encoder_embed_dim=24, --model.encoder_depth=1, --model.decoder_embed_dim=16, --model.decoder_depth=1'
  flags="[$tiny, --optim.batch_size=8, --efficiency.num_workers=0, --efficiency.device=cpu, --data.cache=ram]"
  node=(--config "$recipe" --model.encoder_embed_dim=24 --model.encoder_depth=1 --optim.batch_size=16
    --efficiency.device=cpu --curriculum.preset=etpp --images 1000)
  replay='--data.replay={32: 2}'
  checks=(-k "crops or targets") parallel=() decode=() variants=(mixed)
  run=(--config "$recipe" --model.encoder_embed_dim=24 --model.encoder_depth=1 --optim.batch_size=8
    --efficiency.device=cpu --curriculum.preset=etpp --curriculum.epochs=8)
  data=$work/data
  "$python" - "$data/imagenette128" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

for split, count in (("train", 16), ("val", 4)):
    for name in ("dark", "light"):
        folder = Path(sys.argv[1]) / split / name
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 128, (64, 64, 3)) + 127 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.jpg")
PYTHON
else
  device=cuda recipe=$root/benchmarks/imagenette128.yaml epochs=40 node_seconds=140
  arms=${ARMS:-"plain etpp etpp-hog plain-4x"}
  flags="[--optim.batch_size=1024, --efficiency.precision=bf16, --data.cache=ram]"
  # 512 images a step are a GPU's share of the recipe on eight; 4 epochs of 10,000 images have 31 steps or more at each
  # bandwidth. The first run compiles, if torch.compile works; the others, and node, find its code in the cache.
  node=(--config pretrain/vit_b16_etpp_hog_400ep --optim.batch_size=512 --images 1281167)
  run=(--config pretrain/vit_b16_etpp_hog_400ep --optim.batch_size=512 --curriculum.epochs=4
    --efficiency.micro_batch=512)
  replay='--data.replay={96: 4, 160: 2}'
  decode=(--efficiency.decode=gpu) # variants do not try which is faster
  variants=(deterministic mixed connections priority) # the most informative first
  checks=() parallel=(-n 8) # the tests start processes and wait for them
  "$python" -c 'import xdist' 2>>"$out/log.txt" || parallel=()
fi
images=
if [ -d "$data/imagenet_sample/all" ]; then
  node+=(--data.root "$data/imagenet_sample" --data.train_split all)
  images=$data/imagenet_sample/all copies=40
else
  echo "gpu.sh: node generates its images: DATA has no imagenet_sample/all" | tee -a "$out/log.txt" >&2
  [ -n "${SMOKE:-}" ] && images=$data/imagenette128/train/dark copies=1
fi

left() { echo $((ends - SECONDS)); }

# limited SECONDS COMMAND...: run a command for at most SECONDS, and no longer than the time left; runs save on SIGTERM.
limited() {
  local limit=$1
  shift
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  [ "$limit" -gt 5 ] || return 124
  echo "== $* (at most $limit s)" >>"$out/log.txt"
  timeout --kill-after=10 "$limit" "$@" 2>>"$out/log.txt" & # a signal interrupts `wait`, but no command
  child=$!
  wait "$child"
}

pack() {
  if [ -d "$work/quality" ]; then
    tar -cf "$out/.state.tar" -C "$work" quality && mv "$out/.state.tar" "$out/state.tar"
  fi
  rm -rf "$work"
}
child=
trap pack EXIT
trap 'kill $child 2>/dev/null; wait $child; exit 143' TERM INT # until it has saved, or for 10 s

# goals [VARIANT FOLDER]: write goals.md, with the rows of a run.
goals() { "$python" -m mae_et.benchmarks.gpu_goals "$out" "$@" 2>>"$out/log.txt"; }

# headline VARIANT LIMIT FLAGS...: train the headline recipe briefly, if there is time, and add its rows to run.json.
headline() {
  local variant=$1 limit=$2
  shift 2
  [ -z "$images" ] || [ "$(left)" -lt 60 ] || grep -q "\"$variant\": {\"ended\": true" "$out/run.json" 2>/dev/null && return
  for copy in $(seq "$copies"); do # as classes; copied, as hard links do not cross file systems
    [ -d "$work/images/train/$copy" ] || { mkdir -p "$work/images/train" && cp -r "$images" "$work/images/train/$copy"; }
  done
  limited "$limit" "$python" -m mae_et.benchmarks.variants "$variant" pretrain "${run[@]}" --data.root "$work/images" \
    --output.dir "$work/$variant" --output.log_every=10 --output.checkpoint_every=100% --output.reconstruct_images=0 \
    --output.tensorboard=false "$@" >>"$out/log.txt"
  [ -d "$work/$variant" ] && goals "$variant" "$work/$variant"
  rm -rf "${work:?}/$variant"
}

goals
headline default 150 # it compiles

if [ ! -e "$out/node.json" ]; then
  limited $((node_seconds + 90)) "$python" -m mae_et bench node "${node[@]}" --output.dir "$work/run" \
    --seconds "$node_seconds" --save "$out/node.partial.json" >>"$out/log.txt" &&
    mv "$out/node.partial.json" "$out/node.json"
  goals
fi

headline memory 120 "${decode[@]}" --data.cache=ram
if grep -q "neither TorchCodec" "$out/log.txt"; then variants=() decode=(); fi # nothing decodes on this GPU
headline replay 90 "${decode[@]}" "$replay"

# Longest first.
limited 150 "$python" -m pytest -q -rfEs --gpu-device "$device" --gpu-results "$out/tests.jsonl" \
  "${parallel[@]}" "${checks[@]}" tests/gpu/test_{runs,compiled,decoding,values}.py >>"$out/log.txt"
goals

headline short 120 "${decode[@]}" --data.cache=ram --efficiency.attention=short # it compiles
for variant in "${variants[@]}"; do headline "$variant" 90 "${decode[@]}"; done
rm -rf "$work/images"

if [ ! -d "$data/imagenette128/train" ]; then
  echo "gpu.sh: arms are skipped: DATA has no imagenette128/train" | tee -a "$out/log.txt" >&2
else
  # Whole or not at all: this script may be stopped meanwhile, and then packs what is there.
  mkdir "$work/packed"
  [ -e "$out/state.tar" ] && tar -xf "$out/state.tar" -C "$work/packed" && mv "$work/packed/quality" "$work"
  done_arms=
  for arm in $arms; do
    done_arms=${done_arms:+$done_arms,}$arm
    limited 3600 "$python" -m mae_et bench quality --root "$data/imagenette128" --recipe "$recipe" \
      --folder "$work/quality" --arms "[$done_arms]" --epochs "$epochs" --fine_tune_epochs 0 \
      --flags "$flags" >"$work/quality.json" || break
    cp "$work/quality.json" "$out/.quality.json" && mv "$out/.quality.json" "$out/quality.json"
  done
fi
cat "$out"/*.json "$out/goals.md"
