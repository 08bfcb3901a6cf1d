#!/bin/sh
# data -> trunk -> sae -> prior -> bundle -> its figures and card, one after another: two trainings at once on a few cores are slower than both in turn.
# Every step continues its own checkpoint, so the same command after an interruption goes on where it stopped.
#   tools/train_all.sh [FOLDER=build/train]     TRUNK_MINUTES, SAE_MINUTES, PRIOR_MINUTES, GUIDED_MINUTES, THREADS, PYTHON in the environment
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-build/train}
python=${PYTHON:-$here/../.venv/bin/python}
threads=${THREADS:-$(nproc)}
# The scripts import each other, and nothing else may be found here: the root's kernels/ must stay off the path.
export PYTHONSAFEPATH=1 PYTHONPATH="$here"
# Threads that spin at a barrier make a shared machine 5 to 7 times slower.
export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
quiet="nice -n 19 $python"
# An unfinished training exports its weights too: what is done says so in its log.
is_done() { grep -qs '"done": true' "$1/log.jsonl"; }
[ -f "$out/emoji64.npz" ] || $quiet "$here/data.py" --data "$out/packages" --out "$out/emoji64.npz"
is_done "$out/trunk" || $quiet "$here/train_trunk.py" --data "$out/emoji64.npz" --out "$out/trunk" --minutes "${TRUNK_MINUTES:-60}" --processes "$threads"
is_done "$out/sae" || $quiet "$here/train_sae.py" --data "$out/emoji64.npz" --trunk "$out/trunk/model" --out "$out/sae" --minutes "${SAE_MINUTES:-15}" --threads "$threads"
alone="$out/prior_alone" guided="$out/prior_guided"
is_done "$alone" || $quiet "$here/train_prior.py" --data "$out/emoji64.npz" --out "$alone" --minutes "${PRIOR_MINUTES:-480}" --processes "$threads"
is_done "$guided" || $quiet "$here/train_prior.py" --data "$out/emoji64.npz" --out "$guided" --minutes "${GUIDED_MINUTES:-24}" --processes "$threads" \
    --warm-start "$alone/model" --early "$alone/early" --batch 32 --peak-lr 5e-4 --warmup 30 --ema 0.99 --moved-share 0
is_done "$out/prior" || $quiet "$here/between.py" --start "$alone/model" --end "$guided" --share 0.5 --out "$out/prior"
$quiet "$here/make_bundle.py" --train "$out" --wheels "$out/wheels"
$quiet "$here/bundle_report.py" --data "$out/emoji64.npz" --processes "$threads"
