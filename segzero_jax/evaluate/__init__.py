"""``python -m segzero_jax.evaluate``: one evaluator for every data set."""
