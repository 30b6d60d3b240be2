"""One program that generates text, in a process of its own, a batch at a time on request.

    python benchmarks/_generate_workers.py '{"program": "instar float32", "shape": {...}, ...}'

Prints {"ready": ...} once the weights are there. Then each line of standard input, such as
{"rows": 16, "prompt": 32, "new": 64}, is answered by the seconds that a greedy batch took and its
tokens; {"read": true} by the bytes a second at which memory was read.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np

Generate = Callable[[np.ndarray, int], list[list[int]]]  # prompts [B, S], how many new tokens
READ_BYTES = 1 << 29


def make_instar(job: dict) -> tuple[Generate, dict]:
    """Instar's engine; the first one writes the weights from which the others start."""
    import jax
    import jax.numpy as jnp

    import instar
    from instar.families.llama import llama
    from instar.generation.engine import Engine
    from instar.generation.requests import Request
    from instar.generation.sampling import SamplingConfig
    from instar.generation.weights import for_decoding
    from instar.interchange.card import ModelCard
    from instar.interchange.convert import write_hub_folder
    from instar.interchange.parameters import flatten
    from instar.models.language_model import LanguageModel
    from instar.models.transformer import Execution

    spec = llama(**job["shape"], tied=True, norm_epsilon=1e-5)
    model = LanguageModel(spec, Execution(jnp.dtype(job["dtype"])))
    folder = pathlib.Path(job["weights"])
    if not folder.exists():
        fresh = flatten(jax.device_get(jax.jit(model.init)(jax.random.key(0))))
        write_hub_folder(ModelCard(spec), fresh.__getitem__, folder, np.dtype(np.float32))
    params = instar.load(folder).params
    model, params = for_decoding(model, params)
    engine = Engine(model)

    def generate(prompts: np.ndarray, new: int) -> list[list[int]]:
        greedy = SamplingConfig(new, temperature=0.0)
        done = engine.generate(params, [Request(row, greedy) for row in prompts.tolist()])
        return [completion.tokens for completion in done]

    # Of the embeddings a step reads one row of the table; the head is a matrix of its own.
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params["embedding"].nbytes
    return generate, {"version": jax.__version__, "weight_bytes": weights}


def make_transformers(job: dict) -> tuple[Generate, dict]:
    """Transformers' `generate` in float32, with its cache, on the same weights."""
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    model = transformers.LlamaForCausalLM.from_pretrained(job["weights"]).eval()

    def generate(prompts: np.ndarray, new: int) -> list[list[int]]:
        tokens = torch.from_numpy(prompts)
        with torch.inference_mode():
            found = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
            )
        return found[:, prompts.shape[1] :].tolist()

    return generate, {"version": transformers.__version__, "torch": torch.__version__}


def make_llama_cpp(job: dict) -> tuple[Generate, dict]:
    """llama.cpp, one row at a time, on a GGUF file: its weights are those of the file."""
    import llama_cpp

    model = llama_cpp.Llama(
        job["gguf"], n_ctx=job["shape"]["max_positions"], n_threads=job["threads"], verbose=False
    )

    def generate(prompts: np.ndarray, new: int) -> list[list[int]]:
        rows = []
        for prompt in prompts.tolist():
            model.reset()
            tokens = model.generate(prompt, temp=0.0, top_k=1)
            rows.append([next(tokens) for _ in range(new)])
        return rows

    size = os.path.getsize(job["gguf"])
    return generate, {"version": llama_cpp.__version__, "weight_bytes": size}


def read_memory() -> float:
    """Bytes a second of reading a large array, the faster of two ways: a sum, and a product."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones((READ_BYTES // 4 // 8192, 8192), jnp.float32)
    row = jnp.ones((1, len(array)), jnp.float32)
    seconds = []
    for read in (jax.jit(lambda x, row: x.sum()), jax.jit(lambda x, row: row @ x)):
        jax.block_until_ready(read(array, row))
        for _ in range(3):
            started = time.perf_counter()
            jax.block_until_ready(read(array, row))
            seconds.append(time.perf_counter() - started)
    return READ_BYTES / min(seconds)


MAKERS = {"instar": make_instar, "transformers": make_transformers, "llama.cpp": make_llama_cpp}


def main() -> None:
    job = json.loads(sys.argv[1])
    generate, facts = MAKERS[job["program"].split()[0]](job)
    print(json.dumps({"ready": facts}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "read" in order:
            print(json.dumps({"bytes_per_second": read_memory()}), flush=True)
            continue
        rng = np.random.default_rng(order["rows"])
        size = (order["rows"], order["prompt"])
        prompts = rng.integers(3, job["shape"]["vocab_size"], size)
        started = time.perf_counter()
        tokens = generate(prompts, order["new"])
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
