"""One Transformer, described by a `ModelSpec`; its cache; its heads. Arrays, nothing else."""
