"""What held-out text costs without a neural network, in bits per byte.

    python benchmarks/baselines.py --data DATA [--json benchmarks/results/baselines.json]

Three baselines on a prepared data set, from nothing to all of the training text:

- xz alone: the held-out documents, compressed.
- xz given the training text: how much longer the compressed training text becomes with the held-out
  documents after it, in a window that holds all of it.
- Kneser-Ney: an interpolated, modified 5-gram of the data set's own tokens.

Each codes the ends of documents too (a byte that no text holds, or EOS), and all are divided by the
bytes of the text alone, as `instar pretrain` does.
"""

import argparse
import json
import lzma
import pathlib
import time

import numpy as np
from _kneser_ney import KneserNey

from instar.data.dataset import Split, TokenDataset

END = b"\xff"  # no byte of UTF-8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="the workdir of instar prepare")
    parser.add_argument("--json", default="benchmarks/results/baselines.json")
    arguments = parser.parse_args()
    dataset = TokenDataset.open(arguments.data)
    training, held_out = documents_of(dataset, "train"), documents_of(dataset, "held_out")
    held_out_bytes = text_bytes(dataset, "held_out")
    facts = {
        "vocab_size": dataset.tokenizer.vocab_size,
        "training_bytes": text_bytes(dataset, "train"),
        "training_tokens": sum(map(len, training)),
        "held_out_bytes": held_out_bytes,
        "held_out_documents": len(held_out),
    }
    print(", ".join(f"{name} {value:,}" for name, value in facts.items()))
    text, more = texts_of(dataset, training), texts_of(dataset, held_out)
    baselines = {
        "xz": lambda: 8 * xz(more),
        "xz given the training text": lambda: 8 * (xz(text + more) - xz(text)),
        "Kneser-Ney 5-gram": lambda: KneserNey(training, dataset.tokenizer.vocab_size).bits(
            held_out
        ),
    }
    print(f"{'baseline':28} {'bits per byte':>13} {'seconds':>8}")
    for name, bits in baselines.items():
        start = time.perf_counter()
        facts[name] = bits() / held_out_bytes
        print(f"{name:28} {facts[name]:13.4f} {time.perf_counter() - start:8.1f}", flush=True)
    path = pathlib.Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"written to {path}")


def documents_of(dataset: TokenDataset, split: Split) -> list[np.ndarray]:
    """The tokens of all documents of a split, BOS and EOS included."""
    parts = [
        source.document_tokens(source.documents.of(split)) for source in dataset.sources.values()
    ]
    return [document for part in parts for document in part]


def text_bytes(dataset: TokenDataset, split: Split) -> int:
    """The bytes of the text of a split."""
    return sum(source.facts["splits"][split]["bytes"] for source in dataset.sources.values())


def texts_of(dataset: TokenDataset, documents: list[np.ndarray]) -> bytes:
    """The text of documents, each with an end."""
    return b"".join(dataset.tokenizer.decode(d.tolist()).encode() + END for d in documents)


def xz(text: bytes) -> int:
    """The size of `text` compressed, with all of it in the window."""
    window = max(len(text), 4096)  # the least that LZMA takes
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}]
    return len(lzma.compress(text, lzma.FORMAT_XZ, filters=filters))


if __name__ == "__main__":
    main()
