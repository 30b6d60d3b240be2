"""The files under launch/ that others read, as they read them."""

import pathlib
import re

import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


def read_jobset() -> dict:
    """launch/gke_jobset.yaml as the example in its head fills it in."""
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    head = " ".join(re.findall(r"#\s+export (.*)", text))
    values = dict(pair.split("=", 1) for pair in head.split())
    return yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], text))
