"""Where compiled programs are kept."""

import jax
import pytest

from segzero_jax.compiled import keep_compiled

KEY = "jax_compilation_cache_dir"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = getattr(jax.config, KEY)
    yield tmp_path
    jax.config.update(KEY, before)


@pytest.mark.parametrize(
    ("platform", "told", "kept"),
    [
        ("tpu", None, "HOME/.cache/segzero_jax_compiled"),
        ("gpu", None, "HOME/.cache/segzero_jax_compiled"),
        ("tpu", "gs://bucket/compiled", "gs://bucket/compiled"),
        ("cpu", None, None),
    ],
)
def test_programs_for_accelerators_are_kept_where_the_user_says(platform, told, kept, home, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    jax.config.update(KEY, told)
    keep_compiled()
    assert getattr(jax.config, KEY) == (kept and kept.replace("HOME", str(home)))
