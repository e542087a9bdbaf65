"""The random-number streams of a seed; no two draw the same numbers."""

import jax

# These numbers are folded into the seed's key. A new stream takes a new number: the others must not change.
TRAINING, EVALUATION, EVALUATE_COMMAND, LORA_START = range(4)


def stream_key(seed: int, stream: int) -> jax.Array:
    """The initial key of a stream."""
    return jax.random.fold_in(jax.random.key(seed), stream)
