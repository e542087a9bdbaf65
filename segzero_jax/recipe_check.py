"""Checks of a run's questions before the first step, including for targets that its recipe cannot compare with.

They only need the processor, no weights.
"""

from pathlib import Path

import numpy as np

from segzero_jax import rewards
from segzero_jax.config import Config
from segzero_jax.data.checks import check_held_out, check_prompts, counted_once
from segzero_jax.data.pipeline import DataError, Source, Splits
from segzero_jax.processor import Processor

_NAMED = 5


def check_splits(splits: Splits, config: Config, processor: Processor) -> None:
    """Checks all questions of a run.

    Raises:
      PromptTooLong: some do not fit into ``max_prompt_tokens``.
      DataError: the recipe cannot compare with some targets, or some training images are held out.
    """
    for split in (*splits.train, *splits.held_out):
        check_prompts(split, processor, config.data.dir)
    for split in splits.train:
        check_targets(split, config.reward.recipe, config.data.dir)
        check_held_out(split, splits.held_out)


def check_targets(source: Source, recipe: str, data_dir: str | Path) -> None:
    """Checks the targets of all training questions, once per data set; skipped if the recipe takes any target.

    Raises:
      DataError: the recipe cannot compare with some of them; it names the first ones.
    """
    if not rewards.RECIPES[recipe].single:
        return
    kept = Path(data_dir).expanduser() / "object_counts" / f"{source.checksum}.npy"
    counts = counted_once(kept, source.object_counts)
    (refused,) = np.nonzero([not rewards.can_compare(recipe, int(count)) for count in counts])
    if len(refused):
        texts = source.texts()
        named = ", ".join(f"{texts[row][0]} with {counts[row]}" for row in refused[:_NAMED])
        others = " or ".join(name for name, row in rewards.RECIPES.items() if not row.single)
        raise DataError(
            f"{source.name}: {len(refused)} of {len(counts)} questions have not exactly one object, which "
            f"reward.recipe={recipe} compares with: {named}{', …' if len(refused) > _NAMED else ''}; "
            f"data.prompt=vision_reasoner with reward.recipe={others} takes any number of objects"
        )
