"""Detects the form of a source from its files; refuses an ambiguous folder."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from segzero_jax.data.forms import coco, hub_parquet, refer
from segzero_jax.data.forms.coco import CocoJson
from segzero_jax.data.forms.form import Form, SourceError
from segzero_jax.data.forms.lines import Lines
from segzero_jax.data.forms.reason_seg import ReasonSeg
from segzero_jax.data.forms.refer import Refer

_FORMS = "parquet files, refs(…).p, train|val|test with *.json, *.jsonl, or annotations in *.json"
_PARQUET, _REFER, _REASON_SEG, _LINES, _COCO = "parquet", "REFER", "ReasonSeg", "lines", "COCO"


def find_form(
    name: str,
    sources: Sequence[Path],
    images: Path | None,
    splits: Mapping[Path, str] = MappingProxyType({}),
    downloaded: Collection[Path] = (),
) -> Form:
    """The form of a source.

    Args:
      sources: folders; more than one only for parquet files.
      images: the folder of the images, if it is not below the source.
      splits: the split of each folder whose parquet files are a single split, which overrides the file names.
      downloaded: folders whose parquet files are the source, regardless of other files in them.

    Raises:
      SourceError: a folder does not exist, has no known form or more than one, or ``images`` is given for a form that
        contains its images.
    """
    for source in sources:
        if not source.is_dir():
            raise SourceError(f"--source {source}: no such directory")
    kinds = [_PARQUET if source in downloaded else _kind(name, source) for source in sources]
    if len(sources) > 1 and set(kinds) != {_PARQUET}:
        raise SourceError(f"--source: {len(sources)} directories, expected one unless they all hold parquet files")
    source, kind = sources[0], kinds[0]
    form: Form | None
    if kind == _PARQUET:
        if images is not None:
            raise SourceError(f"--images {images}: parquet files hold their pictures, leave it out")
        form = hub_parquet.find(name, list(sources), splits)
    elif kind == _REASON_SEG:
        if images is not None:
            raise SourceError(f"--images {images}: ReasonSeg's pictures lie beside their JSON files, leave it out")
        form = ReasonSeg.find(name, source)
    elif kind == _REFER:
        form = Refer.find(name, source, images)
    else:
        form = Lines(name, source, images) if kind == _LINES else CocoJson.find(name, source, images)
    if form is None:
        if (references := refer.first_below(source)) is not None:
            found = references.relative_to(source)
            raise SourceError(f"--source {source}: holds {found}; name its folder, --source {references.parent}")
        raise SourceError(f"--source {source}: found none of {_FORMS}")
    return form


def _kind(name: str, source: Path) -> str | None:
    """The form of a folder; None if it has none. Raises SourceError if it has two."""
    references = refer.find_references(name, source)
    if references is not None and references.parent != source:
        # The data set has a folder of its name, so files beside that do not matter.
        return _only(source, {_REFER: references, _PARQUET: hub_parquet.first(references.parent)})
    found = {
        _REFER: references,
        _LINES: min(source.glob("*.jsonl"), default=None),
        _PARQUET: hub_parquet.first(source),
        _REASON_SEG: _asked_of_shapes(source),
    }
    sure = references is not None or found[_LINES] is not None
    if found[_PARQUET] is None and (own := hub_parquet.first_below(source / name)) is not None:
        return _only(source, {_REFER: references, _LINES: found[_LINES], _PARQUET: own})
    if found[_PARQUET] is None and not sure and (below := hub_parquet.first_below(source)) is not None:
        # Ambiguous beside the references of another set, so both are reported.
        found |= {_PARQUET: below, _REFER: refer.first_below(source)}
    if references is None:  # REFER has COCO's instances.json beside its references.
        files = coco.annotation_files(source)
        found[_COCO] = next((path for path in files if coco.is_cocos(path)), None)
        if not any(found.values()):  # The form's reader will report the error in these files.
            return _REASON_SEG if ReasonSeg.find(name, source) is not None else _COCO if files else None
    return _only(source, found)


def _only(source: Path, found: Mapping[str, Path | None]) -> str | None:
    """The only form with a file. Raises SourceError for several, with a file of each."""
    there = {kind: path for kind, path in found.items() if path is not None}
    if len(there) > 1:
        files = " and ".join(str(path.relative_to(source)) for path in there.values())
        raise SourceError(
            f"--source {source}: holds {files}; name the folder of one, or move the others out where they share it"
        )
    return next(iter(there), None)


def _asked_of_shapes(source: Path) -> Path | None:
    """A ReasonSeg JSON file; other programs' JSON files have shapes, too, but no question."""
    try:
        example = ReasonSeg.example(source)
    except SourceError:
        return None
    return example[0] if example is not None and {"shapes", "text"} <= set(example[1]) else None
