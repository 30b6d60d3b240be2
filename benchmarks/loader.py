"""How fast packed rows are read, on one core.

    python benchmarks/loader.py [--json benchmarks/results/loader.json]

Documents of a realistic spread of lengths (log-normal: median 400 tokens, mean 990; a web crawl's
is like it) are written as shards, then rows of S = 2048 are read in the shuffled order of a
training run: directly, and through Grain with one and with two reading threads that share the core.
The files are in the page cache by then, so this is the cost of the code, not of the disk.
"""

import argparse
import json
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from instar.data.arrays import save_arrays
from instar.data.dataset import Documents, TokenDataset, TokenSource, token_dtype
from instar.data.loader import LoaderConfig, batches
from instar.data.packing import pack
from instar.data.rows import TrainingRows
from instar.data.tokenizer import TokenizerConfig, train_tokenizer

SEQUENCE, BATCH, RECORD_TOKENS = 2048, 32, 2**14
VOCAB_SIZES = {"uint16": 50_000, "uint32": 150_000}
STRATEGIES = ("concat", "best_fit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="benchmarks/results/loader.json")
    parser.add_argument("--tokens", type=int, default=30_000_000, help="size of the data set")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each measurement")
    arguments = parser.parse_args()
    core = use_one_core()
    measured = []
    print(f"{'stored':8} {'packing':9} {'read':20} {'M tokens/s':>10}")
    for stored, vocab_size in VOCAB_SIZES.items():
        for strategy in STRATEGIES:
            with tempfile.TemporaryDirectory() as folder:
                dataset = write_dataset(epath.Path(folder), vocab_size, strategy, arguments.tokens)
                rows = TrainingRows(dataset, sequence_length=SEQUENCE, weights={}, seed=0)
                for reading, stream in readings(rows).items():
                    speed = tokens_per_second(stream, arguments.seconds)
                    measured.append(
                        dict(stored=stored, packing=strategy, read=reading, tokens_per_second=speed)
                    )
                    print(f"{stored:8} {strategy:9} {reading:20} {speed / 1e6:10.2f}", flush=True)
    result = {
        "sequence_length": SEQUENCE,
        "rows_per_batch": BATCH,
        "tokens": arguments.tokens,
        "one_core": core,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "measured": measured,
    }
    path = pathlib.Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


def use_one_core() -> bool:
    """Binds this process to one core; False where the system has no call for that."""
    if not hasattr(os, "sched_setaffinity"):
        return False
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return True


def write_dataset(folder: epath.Path, vocab_size: int, strategy: str, tokens: int) -> TokenDataset:
    """A data set of one source with random tokens, laid out as `instar prepare` does."""
    rng = np.random.default_rng(0)
    count = tokens // 990
    lengths = np.clip(rng.lognormal(np.log(400), 1.35, count).astype(np.int64), 8, 500_000)
    records = -(-lengths // RECORD_TOKENS)
    source = folder / "random"
    source.mkdir()
    dtype = token_dtype(vocab_size)
    writer = ArrayRecordWriter(
        str(source / "tokens-00000.array_record"), "group_size:1,uncompressed"
    )
    for length in lengths.tolist():
        document = rng.integers(0, vocab_size, length, dtype)
        for start in range(0, length, RECORD_TOKENS):
            writer.write(document[start : start + RECORD_TOKENS].tobytes())
    writer.close()
    documents = Documents(np.cumsum(records) - records, lengths, 4 * lengths, np.zeros(count, bool))
    save_arrays(source / "documents.npz", documents.__dict__)
    index = pack(np.arange(count), lengths, SEQUENCE, strategy)
    save_arrays(source / f"pack-train-{SEQUENCE}.npz", index.__dict__)
    facts = {"shards": {"tokens-00000.array_record": ""}}
    tokenizer = train_tokenizer(["only its padding token is used"], TokenizerConfig(vocab_size=300))
    sources = {"random": TokenSource(source, facts, vocab_size, RECORD_TOKENS)}
    return TokenDataset(folder, {}, tokenizer, sources)


def readings(rows: TrainingRows) -> dict[str, Iterator[np.ndarray]]:
    """Ways of reading; each yields the tokens of one batch after another."""

    def direct() -> Iterator[np.ndarray]:
        start = 0
        while True:
            yield rows.rows(np.arange(start, start + BATCH))["tokens"]
            start += BATCH

    def grain(threads: int) -> Iterator[np.ndarray]:
        counts = iter(lambda: BATCH, None)
        for batch, _, _ in batches(rows, counts, 0, np.arange, LoaderConfig(threads=threads)):
            yield batch["tokens"]

    return {"direct": direct(), "Grain, 1 thread": grain(1), "Grain, 2 threads": grain(2)}


def tokens_per_second(stream: Iterator[np.ndarray], seconds: float) -> float:
    """The speed after the first batches, which open files and fill caches."""
    for _ in range(10):
        next(stream)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        count += next(stream).size
    return count / elapsed


if __name__ == "__main__":
    main()
