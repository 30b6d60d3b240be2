"""What an import needs in memory, against the size of the model and of its largest parameter.

    python benchmarks/import_memory.py [--json benchmarks/results/import_memory.json]

Writes a LLaMA of random numbers in bfloat16, as transformers stores it, into a temporary folder and
runs `instar import` and `instar export` on it, each in a process of its own. Memory is the highest
resident set of that process (mapped files included) above that of one that imports the same modules
and does nothing.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np

from instar.families.llama import LAYOUT, llama, write_llama_config
from instar.interchange.parameters import flatten
from instar.interchange.safetensors import FolderWriter
from instar.models.language_model import LanguageModel
from instar.models.spec import ModelSpec

WATCHED = (
    "import resource, sys; from instar import cli; from instar.interchange import convert; "
    "code = cli.main(sys.argv[1:]) if sys.argv[1:] else 0; "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)"
)
# Linux counts in KiB, macOS in bytes.
UNIT = 1 if sys.platform == "darwin" else 1024


def write_model(folder: pathlib.Path, spec: ModelSpec) -> None:
    """A folder with config.json and random tensors, written one at a time."""
    shapes = {each.name: each.tensor.shape(each.sizes) for each in LAYOUT.tensors(spec)}
    writer = FolderWriter(folder, shapes, np.dtype(ml_dtypes.bfloat16))
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.write(name, rng.standard_normal(shape, np.float32))
    writer.close()
    config = {"model_type": "llama"} | write_llama_config(spec)
    (folder / "config.json").write_text(json.dumps(config))


def peak(*words: object) -> tuple[int, float]:
    """The bytes of resident memory that the command reached, and its seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-c", WATCHED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stderr.split()[-1]) * UNIT, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="benchmarks/results/import_memory.json")
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--folder", help="where the temporary files go")
    arguments = parser.parse_args()
    width = arguments.width
    spec = llama(depth=arguments.depth, width=width, heads=width // 64, mlp_width=11 * width // 4)
    sizes = {path: 4 * leaf.size for path, leaf in flatten(LanguageModel(spec).shapes).items()}
    largest = max(sizes.values())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        (folder / "theirs").mkdir()
        write_model(folder / "theirs", spec)
        stored = sum(file.stat().st_size for file in (folder / "theirs").iterdir())
        idle, _ = peak()
        steps = {
            "import": ("import", "--from", folder / "theirs", "--to", folder / "ours"),
            "export": ("export", "--checkpoint", folder / "ours", "--to", folder / "back"),
        }
        print(f"a file of {stored / 1e9:.2f} GB (bfloat16), {sum(sizes.values()) / 1e9:.2f} GB")
        print(f"as float32, {largest / 1e9:.2f} GB of them the largest stacked parameter")
        print(f"{'':8}{'GB of memory':>14}{'to largest':>12}{'to model':>10}{'seconds':>10}")
        measured = {}
        for name, words in steps.items():
            reached, seconds = peak(*words)
            used = reached - idle
            measured[name] = {"bytes": used, "to_largest": used / largest, "seconds": seconds}
            share = used / sum(sizes.values())
            print(
                f"{name:8}{used / 1e9:14.2f}{used / largest:12.2f}{share:10.2f}{seconds:10.1f}",
                flush=True,
            )
    result = {
        "file_bytes": stored,
        "float32_bytes": sum(sizes.values()),
        "largest_parameter_bytes": largest,
        "jax": jax.__version__,
        "measured": measured,
    }
    path = pathlib.Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
