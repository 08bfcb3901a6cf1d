#!/bin/sh
# A ConvNeXt beside the embedded ViT: trained on the same pictures, its autoencoder, a bundle with the embedded prior, one question to both.
# Every step continues its own checkpoint, so the same command after an interruption goes on where it stopped.
#   tools/architectures.sh [FOLDER=build/architectures]     TRUNK_MINUTES, SAE_MINUTES, WORD, PYTHON in the environment
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-build/architectures}
python=${PYTHON:-$here/../.venv/bin/python}
data=${DATA:-build/train/emoji64.npz}
embedded=$here/../engine/_root/bundles/emoji64
# The scripts import each other, and nothing else may be found here: the root's kernels/ must stay off the path.
export PYTHONSAFEPATH=1 PYTHONPATH="$here"
export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
quiet="nice -n ${NICE:-10} $python"
[ -f "$out/trunk/model/config.json" ] || $quiet "$here/train_convnext.py" --data "$data" --out "$out/trunk" --minutes "${TRUNK_MINUTES:-25}"
[ -f "$out/sae/config.json" ] || $quiet "$here/train_sae.py" --data "$data" --trunk "$out/trunk/model" --hook stages.1.3 --out "$out/sae" \
    --num-latents 1024 --k 16 --batch 512 --minutes "${SAE_MINUTES:-6}" --threads 1
[ -f "$out/pictures/metadata.jsonl" ] || $quiet "$here/architectures.py" pictures --data "$data" --out "$out/pictures"
[ -f "$out/bundle/bundle.json" ] || $quiet -m tiltscope bundle --prior "$embedded/prior" --pixel-unshuffle 4 --trunk "$out/trunk/model" \
    --sae "$out/sae" --pool "$out/pictures" --name emoji64-convnext --out "$out/bundle"
$quiet "$here/architectures.py" ask --convnext "$out/bundle" --data "$data" --out "$out" ${WORD:+--word "$WORD"}
