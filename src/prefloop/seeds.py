"""Seeds: every random choice draws from a generator named by what it is for.

A seed belongs to (run seed, round, prompt id, k, ...), never to a batch, a worker or the clock, so the same command
gives the same bytes whatever the batch size and wherever it was interrupted.
"""

import hashlib

import numpy as np


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on `seed` and every name, and on nothing else (SHA-256, stable across platforms)."""
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator (Philox) for one named purpose."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, *names)))
