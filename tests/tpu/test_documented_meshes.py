"""Meshes in pages, manifests and the headers of presets are such as ``check_fits`` lets start."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from segzero_jax import config as configs
from segzero_jax.config import Config
from segzero_jax.mesh import parse_mesh

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "tpu/README.md", *(ROOT / f"docs/{name}.md" for name in ("data", "pods", "resume"))]
MANIFESTS = sorted((ROOT / "tpu/gke").glob("*.yaml"))
PRESETS = sorted((ROOT / "configs").rglob("*.yaml"))
# What a page speaks of where it gives options alone.
SEVEN_B = ROOT / "configs/seg_zero_7b.yaml"
OPTION = re.compile(r"--(config|mesh|train\.\w*batch_size)[= ]([\w./-]*\w)")


def spans(page: Path) -> Iterator[str]:
    """Commands, code in a line, and a container's arguments."""
    text = page.read_text()
    if page.suffix == ".yaml":
        yield from (line.lstrip("# ") for line in text.splitlines() if line.lstrip().startswith("#"))
        for document in yaml.safe_load_all(text):
            yield from containers(document)
        return
    yield from re.findall(r"`([^`\n]+)`", text)
    yield from re.findall(r"^ {4,}(.*)$", text.replace("\\\n", ""), re.MULTILINE)


def containers(value: object) -> Iterator[str]:
    for key, held in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key == "args":
            yield shlex.join(held)
        yield from containers(held)


def meshes(page: Path) -> list[tuple[str, Config]]:
    """The spans that give a mesh, each with the configuration that it means."""
    found = []
    for span in spans(page):
        given = dict(OPTION.findall(span))
        if "mesh" not in given:
            continue
        alone = page if page in PRESETS else None if "python -m" in span else SEVEN_B
        preset = ROOT / given.pop("config") if "config" in given else alone
        found.append((span, configs.load(preset, [f"{key}={value}" for key, value in given.items()])))
    return found


@pytest.mark.parametrize("page", [*PAGES, *MANIFESTS, *PRESETS], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_rows_of_a_mesh_divide_the_batches(page: Path) -> None:
    for span, config in meshes(page):
        data, fsdp, _ = parse_mesh(config.mesh)
        sizes = config.train.batch_size, config.train.micro_batch_size
        assert [size % (data * fsdp) for size in sizes] == [0, 0], span


def test_what_is_looked_at_is_there() -> None:
    found = {page.relative_to(ROOT).as_posix(): [config.mesh for _, config in meshes(page)] for page in PAGES + PRESETS}
    assert found["tpu/README.md"] == ["2x4x4", "4x4", "4x4", "4x4"]
    assert found["docs/data.md"] == ["4x4"]
    assert found["docs/pods.md"] == ["2x4x4", "4x4", "4x4"]
    assert all(found[page.relative_to(ROOT).as_posix()] for page in PRESETS)
    manifests = [config.mesh for page in MANIFESTS for _, config in meshes(page)]
    assert manifests == ["2x4x4", "4x4"]
