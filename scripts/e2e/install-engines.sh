#!/usr/bin/env bash
# Installs an SGLang that serves on a CPU, and two tiny models to serve, for scripts/e2e/sglang.sh.
#
#   scripts/e2e/install-engines.sh DIR
#
# Makes DIR/sglang (a virtual environment, about 6 GB, PyPI only) and DIR/model-a, DIR/model-b (1 MB each:
# equal shapes, other weights). SGLang's own files stay as they come. Run it again after a failure: what is
# complete is kept.
set -euo pipefail

SGLANG=0.5.23 # the version that docs/engines.md speaks of
TORCH=2.13.0
KERNEL=0.4.10 # what this SGLang asks of the package sglang-kernel

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
[[ $# -eq 1 && $1 != -* ]] || usage
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
venv=$dir/sglang
python=$venv/bin/python

say() { printf '%s\n' "install-engines: $*" >&2; }

# The requirements of a wheel that a CPU can use. What is left out needs CUDA and is only imported where
# there is a GPU; torch and its kin are installed before, in a version that runs on both.
requirements() {
  "$python" - "$1" <<'PY'
import re, sys, zipfile
from packaging.requirements import Requirement

GPU = re.compile(
    r"cuda-|flash-attn|flashinfer|humming-kernels|nvidia-(cutlass|mathdx)|nvshmem|quack-kernels|sgl-|sglang-kernel|tilelang|torch"
)
wheel = zipfile.ZipFile(sys.argv[1])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in wheel.read(metadata).decode().splitlines():
    key, _, value = line.partition(": ")
    if key != "Requires-Dist":
        continue
    need = Requirement(value)
    wanted = need.marker is None or need.marker.evaluate({"extra": ""})
    if wanted and not GPU.match(need.name.lower().replace("_", "-")):
        print(str(need).split(";")[0].strip())
PY
}

# The CPU build of SGLang's kernels is not on PyPI. With the plain PyTorch attention nothing of it is
# called, so a package that can be imported is enough.
kernel_stand_in() {
  local site=$1
  mkdir -p "$site/sgl_kernel" "$site/sglang_kernel-$KERNEL.dist-info"
  printf 'Metadata-Version: 2.1\nName: sglang-kernel\nVersion: %s\n' "$KERNEL" \
    >"$site/sglang_kernel-$KERNEL.dist-info/METADATA"
  cat >"$site/sgl_kernel/__init__.py" <<PY
"""Stands in for SGLang's compiled kernels: every name can be imported, none can be called."""

__version__ = "$KERNEL"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is not installed on this machine")

    return absent
PY
}

install_sglang() {
  [[ -e $venv/.complete ]] && return
  say "SGLang $SGLANG into $venv"
  python3 -m venv "$venv"
  "$python" -m pip install -q "torch==$TORCH" "setuptools<80" numpy packaging
  "$python" -m pip install -q --no-deps torchvision==0.28.0 torchaudio==2.11.0 torch_memory_saver
  "$python" -m pip download -q --no-deps -d "$dir/wheels" "sglang==$SGLANG"
  local wheel
  wheel=$(ls "$dir"/wheels/sglang-"$SGLANG"-*.whl)
  requirements "$wheel" >"$dir/wheels/requirements.txt"
  "$python" -m pip install -q -r "$dir/wheels/requirements.txt" "torch==$TORCH"
  "$python" -m pip install -q --no-deps "$wheel"
  kernel_stand_in "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  touch "$venv/.complete"
}

install_sglang
for name in a b; do
  [[ -e $dir/model-$name/config.json ]] || "$python" "$here/make_model.py" "$dir/model-$name" "$name"
done
say "done; now: scripts/e2e/sglang.sh $dir"
