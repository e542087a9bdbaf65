"""What is found out before the first step about data and rewards: targets that the recipe cannot compare with."""

import contextlib
import io
from pathlib import Path

import numpy as np

from segzero_jax import jsonl, rewards
from segzero_jax.data.pipeline import DataError, Source

_NAMED = 5


def check_targets(source: Source, recipe: str, data_dir: str | Path) -> None:
    """Looks at the targets of all questions to train on, once for a data set; not at all where the recipe takes any.

    Raises:
      DataError: the recipe cannot compare with some of them; it names the first.
    """
    if not rewards.RECIPES[recipe].single:
        return
    counts = _object_counts(source, Path(data_dir).expanduser() / "object_counts")
    (refused,) = np.nonzero([not rewards.can_compare(recipe, int(count)) for count in counts])
    if len(refused):
        texts = source.texts()
        named = ", ".join(f"{texts[row][0]} with {counts[row]}" for row in refused[:_NAMED])
        others = " or ".join(name for name, row in rewards.RECIPES.items() if not row.single)
        raise DataError(
            f"{source.name}: {len(refused)} of {len(counts)} questions have not exactly one object, which "
            f"reward.recipe={recipe} compares with: {named}{', …' if len(refused) > _NAMED else ''}; "
            f"reward.recipe={others} takes any number of objects"
        )


def _object_counts(source: Source, cache: Path) -> np.ndarray:
    path = cache / f"{source.checksum}.npy"
    if path.is_file():
        return np.load(path)
    counts = source.object_counts()
    content = io.BytesIO()
    np.save(content, counts)
    with contextlib.suppress(OSError):  # Data may lie where nobody may write; then they are counted each time.
        cache.mkdir(exist_ok=True)
        jsonl.replace(path, content.getvalue())
    return counts
