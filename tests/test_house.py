"""The laws of the house. They read the tree as it stands, so a new module is covered from its first line."""

import ast
import gc
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import segzero_jax

ROOT = Path(__file__).parent.parent
PACKAGES = ("segzero_jax", "reward_server")
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")

# Each may import the ones before it, never one after it. A name stands for a module or a whole sub-package; a module
# that is not named here may stand anywhere as long as no circle arises.
ORDER = (
    *("config", "terminal", "file_lock"),
    *("hub", "mesh", "pods", "types", "jsonl", "answers", "prompt", "frames", "patches", "processor", "data", "model"),
    *(
        "rollout",
        "rewards",
        "reward_channel",
        "reward_messages",
        "reward_probe",
        "reward_connection",
        "pending_scores",
        "reward_client",
    ),
    *("local_server", "reward_service"),
    *("grpo", "identity", "manifest", "checkpoint_paths", "failed_saves", "checkpoint", "keeper", "preemption"),
    *("tensorboard", "progress", "metrics", "time_account", "profiling", "watch", "patience"),
    *("overlay", "report", "own_rewards", "scoring", "evaluation"),
    *("dynamic_sampling", "record"),
    "asking",
    *("segmenting", "options", "answering", "job", "run_dir", "loop", "train", "demo", "infer", "evaluate", "rescore"),
    *("plan", "export"),
)
# What a part must not know of, however indirectly: (part, its business, what would be somebody else's).
IGNORANCE = (
    (
        "grpo",
        "numbers, not text or calls",
        {"answers", "prompt", "patches", "processor", "rewards", "reward_client", "data"},
    ),
    (
        "model",
        "tensors, not text or tasks",
        {"answers", "prompt", "patches", "processor", "rewards", "rollout", "grpo", "data"},
    ),
    (
        "rewards",
        "text, not tensors or servers",
        {"model", "rollout", "grpo", "reward_client", "mesh", "patches", "processor"},
    ),
    ("config", "nothing but itself", set(ORDER) - {"config"}),
)
STUBS = {"reward_server", "reward_server.reward_pb2", "reward_server.reward_pb2_grpc"}


def sources(package: str) -> list[Path]:
    found = [path for path in sorted((ROOT / package).rglob("*.py")) if not GENERATED.search(path.name)]
    assert found, f"no sources in {package}"
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at whatever depth of the code, in full."""
    # A collection in the midst of it may run code that parses as well, which CPython 3.11 miscounts (SystemError).
    gc.disable()
    try:
        tree = ast.parse(path.read_text(), str(path))
    finally:
        gc.enable()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            for alias in node.names:  # "from a import b" imports a.b where that is a module
                whole = f"{node.module}.{alias.name}"
                yield whole if is_module(whole) else str(node.module)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file() or path.is_dir()


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def part_graph() -> dict[str, set[str]]:
    """Which parts (modules and sub-packages directly in segzero_jax) import which."""
    graph: dict[str, set[str]] = {}
    for path in sources("segzero_jax"):
        part = part_of(module_name(path))
        found = {part_of(name) for name in imports(path) if name.startswith("segzero_jax.")}
        graph.setdefault(part, set()).update(found - {part})
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    front = [start]
    while front:
        for target in graph.get(front.pop(), set()) - seen:
            seen.add(target)
            front.append(target)
    return seen


def test_no_part_imports_itself_in_a_circle():
    graph = part_graph()
    assert [part for part in graph if part in reachable(graph, part)] == []


def test_imports_point_one_way():
    graph = part_graph()
    place = {part: index for index, part in enumerate(ORDER)}
    upward = [
        f"{part} imports {target}"
        for part in graph.keys() & place.keys()
        for target in reachable(graph, part) & place.keys()
        if place[target] >= place[part]
    ]
    assert upward == []


@pytest.mark.parametrize(("part", "business", "foreign"), IGNORANCE, ids=[row[0] for row in IGNORANCE])
def test_a_part_minds_its_own_business(part, business, foreign):
    assert reachable(part_graph(), part) & foreign == set(), f"{part} knows {business}"


def test_the_toy_scenes_are_plain_numpy_and_pillow():
    """The script that makes the toy SAM 2 uses them beside torch, without JAX."""
    allowed = {"numpy", "PIL"} | sys.stdlib_module_names
    assert {name.split(".")[0] for name in imports(ROOT / "segzero_jax/data/scenes.py")} <= allowed


@pytest.mark.parametrize(
    ("package", "foreign"),
    [
        ("segzero_jax", {"torch", "torchvision", "sam2", "transformers", "tensorflow"}),
        ("reward_server", {"jax", "jaxlib", "flax", "optax", "orbax", "segzero_jax", "transformers", "tensorflow"}),
    ],
)
def test_no_line_imports_the_other_framework(package, foreign):
    offenders = [
        f"{module_name(path)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if name.split(".")[0] in foreign or (package == "segzero_jax" and "reward_server" in name and name not in STUBS)
    ]
    assert offenders == []


def loaded_after_importing(package: str) -> set[str]:
    """What a fresh process holds after importing every module of a package; it must not have started a JAX backend."""
    names = [module_name(path) for path in sources(package) if path.name != "__main__.py"]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
if "jax" in sys.modules:
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized(), "an import started a JAX backend"
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_trainer_loads_no_torch():
    """Not through a library either: some import torch merely because it is there."""
    assert importlib.util.find_spec("torch"), "without torch installed this would prove nothing"
    loaded = loaded_after_importing("segzero_jax")
    assert loaded & {"torch", "transformers", "tensorflow", "sam2"} == set()
    assert {name for name in loaded if name.split(".")[0] == "reward_server"} <= STUBS


def test_the_reward_server_loads_no_jax():
    assert importlib.util.find_spec("jax"), "without jax installed this would prove nothing"
    assert (
        loaded_after_importing("reward_server") & {"jax", "flax", "segzero_jax", "transformers", "tensorflow"} == set()
    )


def distributions(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in requirements}  # type: ignore[union-attr]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_declared(package):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = distributions(project["dependencies"])
    if package == "reward_server":
        declared |= distributions(project["optional-dependencies"]["reward"]) | {"sam2"}
    else:
        declared |= distributions(project["optional-dependencies"]["demo"])
    owners = importlib.metadata.packages_distributions()
    missing = set()
    for path in sources(package):
        for name in {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - set(PACKAGES):
            if not declared & {owner.lower().replace("_", "-") for owner in owners.get(name, [name])}:
                missing.add(f"{module_name(path)} imports {name}")
    assert missing == set()


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==")[0].lower().replace("_", "-") for line in lines if line and not line.startswith("#")]
    assert len(pins) == len(set(pins)), "a package is pinned twice"
    extras = project["optional-dependencies"]
    wanted = distributions(project["dependencies"])
    for extra in ("reward", "demo", "dev"):
        wanted |= distributions(extras[extra])
    assert wanted - set(pins) == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_are_short_and_about_something(package):
    long = {module_name(path): n for path in sources(package) if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}
    assert [module_name(path) for path in sources(package) if re.search(r"util|helper|misc|common", path.stem)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short(package):
    long = {}
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                if lines > 60:
                    long[f"{module_name(path)}.{node.name}"] = lines
    assert long == {}


def test_no_test_is_skipped():
    escape = re.compile(r"\bpytest\.(mark\.)?(skip|skipif|xfail|importorskip)\b|unittest\.skip")
    found = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "tests").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if escape.search(line) and "re.compile" not in line
    }
    assert found == set()


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert segzero_jax.__version__ == project["version"]


def test_pages_name_commands_and_files_that_exist():
    """In pages and in the headers of presets: ``python -m x.y``, and paths under this repository's folders."""
    missing = set()
    for page in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "configs").rglob("*.yaml"),
        ROOT / "tpu/README.md",
    ):
        text = page.read_text()
        for module in re.findall(r"python -m ((?:segzero_jax|reward_server)[\w.]*)", text):
            path = ROOT.joinpath(*module.split("."))
            if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
                missing.add(f"{page.relative_to(ROOT)}: python -m {module}")
        for path in re.findall(r"\b((?:segzero_jax|reward_server|scripts|tests|docs|configs)/[\w./*-]+\w)", text):
            if not list(ROOT.glob(path)):
                missing.add(f"{page.relative_to(ROOT)}: {path}")
    assert missing == set()


def test_nothing_is_installed_from_an_index_that_does_not_have_it():
    """The package is on none, so pages and messages install it from a clone."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tpu/README.md"]
    found = [f"{page.relative_to(ROOT)}" for page in pages if "segzero-jax[" in page.read_text()]
    found += [
        module_name(path) for package in PACKAGES for path in sources(package) if "segzero-jax[" in path.read_text()
    ]
    assert found == []


def test_links_between_pages_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tpu/README.md"]
    link = re.compile(r"\]\(([^)#\s]+)|src=\"([^\"]+)")
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in ("".join(groups) for groups in link.findall(page.read_text()))
        if not target.startswith(("http://", "https://")) and not (page.parent / target).exists()
    ]
    assert pages
    assert broken == []
