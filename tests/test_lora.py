"""Low-rank adapters: the numbers of merged weights, gradients by the chain rule, on any mesh; only they learn."""

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import peft
import pytest
import torch
from safetensors.numpy import load_file
from tiny import DIMS, encode, hf_config, load_processor, prompts, random_policy
from torch_policy import load_torch, torch_inputs

from segzero_jax import asking, export
from segzero_jax import config as configs
from segzero_jax.checkpoint import Checkpoints
from segzero_jax.config import Config, GrpoConfig, TrainConfig
from segzero_jax.grpo import (
    LossConfig,
    TrainState,
    UpdateBatch,
    counted,
    group_loss,
    initial_state,
    make_loss_config,
    make_optimizer,
    policy_logps,
    update,
)
from segzero_jax.identity import Identity, fingerprint
from segzero_jax.job import prepare
from segzero_jax.mesh import FSDP, ROLLOUT, TRAIN, Layout, make_mesh
from segzero_jax.model import load_hf, save_hf
from segzero_jax.model.lora import Adapters, abstract_adapters, adapt, merge
from segzero_jax.model.policy import DecoderBlocks, ForwardConfig, Policy, _linear, prompt_logits
from segzero_jax.model.weights import CheckpointError
from segzero_jax.pods import ALONE
from segzero_jax.rollout import Sampling, rollout_layout, sample
from segzero_jax.saved_policy import load_policy
from segzero_jax.types import Rollout

RANK, SCALE = 4, 0.5
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
PROCESSOR = load_processor()
BATCH, GROUP, LENGTH = 16, 2, 8
SAMPLING = Sampling(GROUP, LENGTH, PROCESSOR.end_ids, PROCESSOR.pad_id, PROCESSOR.visual_ids)
LOSS = LossConfig(GrpoConfig(entropy_coef=0.01), 0.8, PROCESSOR.visual_ids, False, LENGTH, SCALE)
MATRICES = {
    "q_dnh": (("l", "d"), ("n", "h")),
    "k_dkh": (("l", "d"), ("k", "h")),
    "v_dkh": (("l", "d"), ("k", "h")),
    "o_nhd": (("l", "n", "h"), ("d",)),
    "gate_df": (("l", "d"), ("f",)),
    "up_df": (("l", "d"), ("f",)),
    "down_fd": (("l", "f"), ("d",)),
}


def random_adapters(layout: Layout = TRAIN, seed: int = 7) -> Adapters:
    """Adapters that change something, the same on every mesh."""
    rng, mesh = np.random.default_rng(seed), jax.sharding.get_mesh()

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
        assert leaf.sharding is not None
        return jax.device_put(values, jax.sharding.NamedSharding(mesh, leaf.sharding.spec))

    return jax.tree.map(fill, abstract_adapters(DIMS, RANK, layout))


def place(tree: Any) -> Any:
    put = lambda x: jax.device_put(x, TRAIN.spec("batch", *(None,) * (x.ndim - 1)))  # noqa: E731
    return jax.tree.map(put, tree)


def make_batch() -> UpdateBatch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 490, (BATCH, GROUP, LENGTH), dtype=np.int32)
    lengths = rng.integers(1, LENGTH + 1, (BATCH, GROUP), dtype=np.int32)
    rollout = Rollout(tokens, lengths, np.zeros(tokens.shape, np.float32), lengths > 0)
    learnt = rng.standard_normal((BATCH, GROUP)).astype(np.float32)
    ref = np.full(tokens.shape, -6, np.float32)
    return place(UpdateBatch(prompts(BATCH, PROCESSOR), rollout, learnt, lengths > 0, ref))


def by_hand(policy: Policy, adapters: Adapters) -> dict[str, np.ndarray]:
    """The matrices with their adapters added, in float64."""
    found = {}
    for name, (inputs, outputs) in MATRICES.items():
        i, o = "".join(inputs[1:]), "".join(outputs)
        adapter, weight = getattr(adapters, name), getattr(policy.blocks, name)
        down, up = (np.asarray(x[...], np.float64) for x in (adapter.down, adapter.up))
        change = np.einsum(f"l{i}r,lr{o}->l{i}{o}", down, up)
        found[name] = np.asarray(weight[...], np.float64) + SCALE * change
    return found


def logps(policy: Policy, batch: UpdateBatch, dtype: jnp.dtype = FLOAT32) -> np.ndarray:
    fwd = ForwardConfig(DIMS, TRAIN, dtype)
    return np.asarray(policy_logps(policy, batch.prompts, batch.rollout.tokens_bgr, fwd=fwd, loss_config=LOSS))


def close(found: Any, expected: Any, relative: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=relative * np.abs(expected).max())


def test_fresh_adapters_change_nothing_and_are_the_same_on_every_mesh() -> None:
    drawn = []
    for mesh in ("2x2x4", "1x1"):
        with jax.set_mesh(make_mesh(mesh)):
            fresh = jax.jit(lambda key: Adapters(DIMS, TRAIN, RANK, key))(jax.random.key(3))
            drawn.append(jax.device_get(fresh))
    with jax.set_mesh(make_mesh("1x1")):
        policy, batch = random_policy(), make_batch()
        np.testing.assert_array_equal(logps(adapt(policy, fresh, SCALE), batch), logps(policy, batch))
    jax.tree.map(np.testing.assert_array_equal, *drawn)
    gate, up = (np.asarray(getattr(drawn[0], name).down[...]) for name in ("gate_df", "up_df"))
    assert not np.array_equal(gate, up), "each matrix has numbers of its own"
    for name, (inputs, _) in MATRICES.items():
        down = np.asarray(getattr(drawn[0], name).down[...])
        bound = np.prod(down.shape[1 : len(inputs)]) ** -0.5
        assert 0.9 * bound < np.abs(down).max() <= bound, name
        assert not np.asarray(getattr(drawn[0], name).up[...]).any()


def test_adapted_is_merged_in_training_and_in_rollout() -> None:
    with jax.set_mesh(make_mesh("1x1")):
        policy, adapters, batch = random_policy(), random_adapters(), make_batch()
        adapted = adapt(policy, adapters, SCALE)
        merged = merge(adapted)
        assert jax.tree.structure(merged) == jax.tree.structure(policy)
        same = jax.tree.map(lambda ours, theirs: ours is theirs, merged, policy)
        assert jax.tree.leaves(same).count(False) == len(MATRICES), "memory is for one of what does not change"
        assert jax.tree.all(jax.tree.map(lambda ours, theirs: ours is theirs, merge(policy), policy))
        for name, expected in by_hand(policy, adapters).items():
            np.testing.assert_allclose(getattr(merged.blocks, name)[...], expected, rtol=1e-6, atol=1e-7)
        plain, expected = logps(policy, batch), logps(merged, batch)
        assert np.abs(plain - expected).max() > 0.1, "they change something"
        close(logps(adapted, batch), expected, 1e-5)
        rollouts = []
        for whole, rank in ((adapted, RANK), (merged, 0)):
            weights = rollout_layout(DIMS, FLOAT32, rank)(whole)
            fwd = ForwardConfig(DIMS, ROLLOUT, FLOAT32)
            rollouts.append(sample(weights, batch.prompts, jax.random.key(0), fwd=fwd, sampling=SAMPLING))
        np.testing.assert_array_equal(rollouts[0].tokens_bgr, rollouts[1].tokens_bgr)
        close(rollouts[0].logps_bgr, rollouts[1].logps_bgr, 1e-5)


def test_what_bfloat16_weights_could_not_hold_still_counts() -> None:
    """Early in a run adapters change weights by less than half a last place, and products by less than one."""
    rng = np.random.default_rng(0)
    with jax.set_mesh(make_mesh("1x1")):
        policy = jax.tree.map(lambda x: x.astype(BFLOAT16), random_policy())
        adapted = adapt(policy, jax.tree.map(lambda x: 0.04 * x, random_adapters()), SCALE)
        first = lambda policy: jax.tree.map(lambda x: x[0], policy.blocks)  # noqa: E731
        x_btd = jnp.asarray(rng.standard_normal((1, 4096, DIMS.hidden)), BFLOAT16)

        def product(block: DecoderBlocks, dtype: jnp.dtype = BFLOAT16) -> np.ndarray:
            out = jax.sharding.PartitionSpec(None, None, None)
            return np.asarray(_linear("btd,df->btf", x_btd.astype(dtype), block, "gate_df", None, out), np.float64)

        own, merged = first(adapted), first(merge(adapted))
        assert np.mean(np.asarray(merged.gate_df[...] == first(policy).gate_df[...])) > 0.7, "most would not change"
        exact = product(own, FLOAT32) - product(first(policy), FLOAT32)
        share = lambda block: ((product(block) - product(first(policy))) * exact).sum() / (exact**2).sum()  # noqa: E731
        assert abs(share(own) - 1) < 0.02
        assert abs(share(merged) - 1) > 0.1


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule() -> None:
    with jax.set_mesh(make_mesh("1x1")):
        policy, adapters, batch = random_policy(), random_adapters(), make_batch()
        fwd, counts = ForwardConfig(DIMS, TRAIN, FLOAT32, remat=True), counted(batch)
        loss = lambda whole: group_loss(whole, batch, counts, fwd, LOSS)[0]  # noqa: E731
        found = jax.jit(jax.grad(lambda own: loss(adapt(policy, own, SCALE))))(adapters)
        full = jax.jit(jax.grad(loss))(merge(adapt(policy, adapters, SCALE)))
        for name, (inputs, outputs) in MATRICES.items():
            i, o = "".join(inputs[1:]), "".join(outputs)
            adapter, gradient = getattr(adapters, name), np.asarray(getattr(full.blocks, name)[...], np.float64)
            down, up = (np.asarray(x[...], np.float64) for x in (adapter.down, adapter.up))
            close(getattr(found, name).down[...], SCALE * np.einsum(f"l{i}{o},lr{o}->l{i}r", gradient, up), 1e-4)
            close(getattr(found, name).up[...], SCALE * np.einsum(f"l{i}{o},l{i}r->lr{o}", gradient, down), 1e-4)


@pytest.fixture(scope="module")
def one() -> tuple[np.ndarray, Any, dict[str, float], Any]:
    return run_update("1x1", TRAIN, 1)


def run_update(mesh: str, layout: Layout, micro_batches: int) -> tuple[np.ndarray, Any, dict[str, float], Any]:
    """Logits, and what an update makes of adapters: its gradients, its metrics, and what they are by then."""
    optimizer, fwd = make_optimizer(TrainConfig(lr=1e-2), freeze_vision=False), ForwardConfig(DIMS, layout, FLOAT32)
    with jax.set_mesh(make_mesh(mesh)):
        base, adapters, batch = random_policy(layout=layout), random_adapters(layout), make_batch()
        before = jax.tree.map(np.array, base)
        logits = jax.jit(lambda policy: prompt_logits(policy, batch.prompts, fwd))(adapt(base, adapters, SCALE))
        state = initial_state(adapters, optimizer)
        donated = jax.tree.leaves(state)
        run = {"optimizer": optimizer, "fwd": fwd, "loss_config": LOSS, "micro_batches": micro_batches}
        state, metrics = update(state, batch, base=base, **run)
        assert [leaf.shape for leaf in donated if not leaf.is_deleted()] == []
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(base))
        abstract = jax.tree.leaves(abstract_adapters(DIMS, RANK, layout))
        placed = [leaf.sharding.spec for leaf in jax.tree.leaves(state.params)]
        assert placed == [leaf.sharding.spec for leaf in abstract]
        gradients, after = jax.tree.map(np.array, (optax.tree.get(state.opt_state, "mu"), state.params))
    return np.asarray(logits), gradients, jax.tree.map(float, metrics), after


@pytest.mark.parametrize(
    ("mesh", "layout", "micro_batches"),
    [("4x4", TRAIN, 1), ("2x4x2", TRAIN, 2), ("4x4", FSDP, 1), ("2x2x2", FSDP, 2)],
    ids=lambda value: value.name if isinstance(value, Layout) else None,
)
def test_an_update_is_the_same_on_every_mesh_and_in_micro_batches(
    mesh: str, layout: Layout, micro_batches: int, one: tuple[np.ndarray, Any, dict[str, float], Any]
) -> None:
    logits, gradients, metrics, after = run_update(mesh, layout, micro_batches)
    close(logits, one[0], 1e-5)
    jax.tree.map(lambda x, y: close(x, y, 1e-4), gradients, one[1])
    assert metrics == pytest.approx(one[2], rel=1e-4, abs=1e-5)
    jax.tree.map(assert_same_step, after, one[3], one[1])


def assert_same_step(found: np.ndarray, expected: np.ndarray, gradient: np.ndarray) -> None:
    """AdamW's first step has the size of the learning rate, whatever the gradient; of the least, the sign is noise."""
    clear = np.abs(gradient) > 1e-2 * np.abs(gradient).max()
    np.testing.assert_allclose(found[clear], expected[clear], atol=1e-5)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Config, Adapters]:
    """A run of adapters with one checkpoint."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(hf_config()))
    where = {"model.path": str(model), "run.dir": str(tmp_path / "run"), "model.compute_dtype": "bfloat16"}
    config = configs.replace(Config(), **where, **{"model.lora_rank": RANK, "model.lora_alpha": RANK * SCALE})
    with jax.set_mesh(make_mesh("2x2")), Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        save_hf(random_policy(), DIMS, model)  # in bfloat16
        identity = Identity(fingerprint(load_hf(model, dtype=BFLOAT16)[0], BFLOAT16), None)
        checkpoints.save(3, TrainState(random_adapters(), (), jnp.int32(3)), {}, config, identity)
        checkpoints.wait()
    with jax.set_mesh(make_mesh("1x1")):
        return config, random_adapters()


def test_a_checkpoint_holds_the_adapters_alone_and_is_loaded_onto_its_model(run: tuple[Config, Adapters]) -> None:
    config, adapters = run
    with ocp.StandardCheckpointer() as reader:
        stored = reader.restore(Path(config.run.dir) / "checkpoints/3/policy")
    assert sorted(name.partition("/")[0] for name in stored) == sorted([*MATRICES, *MATRICES]), "down and up of each"
    shapes = [np.asarray(leaf).shape for _, leaf in sorted(stored.items())]
    assert sorted(shapes) == sorted(leaf.shape for leaf in jax.tree.leaves(adapters))
    with jax.set_mesh(make_mesh("1x1")):
        policy, dims, found = load_policy(config.run.dir, FLOAT32)
        assert (dims, found) == (DIMS, config)
        for name, expected in by_hand(load_hf(config.model.path)[0], adapters).items():
            np.testing.assert_allclose(getattr(merge(policy).blocks, name)[...], expected, rtol=1e-6, atol=1e-7)


def test_an_export_has_the_merged_weights(run: tuple[Config, Adapters], tmp_path: Path) -> None:
    config, adapters = run
    assert export.main(["--run", config.run.dir, "--out", str(tmp_path / "out"), "--dtype=float32"]) == 0
    with jax.set_mesh(make_mesh("1x1")):
        exported, base = load_hf(tmp_path / "out")[0], load_hf(config.model.path)[0]
        for name, expected in by_hand(base, adapters).items():
            np.testing.assert_allclose(getattr(exported.blocks, name)[...], expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(exported.embed_vd[...], base.embed_vd[...])


def test_what_float32_keeps_is_not_rounded_when_an_export_is_asked(
    run: tuple[Config, Adapters],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run computes in bfloat16, and adds its adapters to what it has computed."""
    config, adapters = run
    monkeypatch.setattr(asking, "load_processor", lambda *_: None)  # The run's model has no tokenizer.
    for dtype in ("float32", "bfloat16"):
        assert export.main(["--run", config.run.dir, "--out", str(tmp_path / dtype), "--dtype", dtype]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "the adapters change" in line]
    with jax.set_mesh(make_mesh("1x1")):
        base = load_hf(config.model.path)[0]
        exact = by_hand(base, adapters)
        asked = asking.load(str(tmp_path / "float32"))
        assert (asked.config.model.compute_dtype, asked.config.data.prompt) == ("float32", config.data.prompt)
        rounding = change = 0.0
        for name, expected in exact.items():
            np.testing.assert_allclose(getattr(asked.policy.blocks, name)[...], expected, rtol=1e-6, atol=1e-7)
            rounding += np.sum((np.asarray(expected.astype(BFLOAT16), np.float32) - expected) ** 2)
            change += np.sum((expected - np.asarray(getattr(base.blocks, name)[...])) ** 2)
        assert asking.load(str(tmp_path / "bfloat16")).config.model.compute_dtype == "bfloat16"
    share = f"{np.sqrt(rounding / change):.2g}"
    assert said == [
        f"rounded to bfloat16, the merged matrices are off by {share} of what the adapters change; "
        "--dtype=float32 and --adapters keep all of it"
    ]


def test_adapters_written_alone_are_those_that_peft_loads(run: tuple[Config, Adapters], tmp_path: Path) -> None:
    config, adapters = run
    out = tmp_path / "out"
    assert export.main(["--run", config.run.dir, "--out", str(out), "--adapters"]) == 0
    written = {"adapter_config.json", "adapter_model.safetensors", "segzero_jax.json"}
    assert {file.name for file in out.iterdir()} == written
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # That a tensor is missing is a warning of PEFT's.
        model = peft.PeftModel.from_pretrained(load_torch(Path(config.model.path)), out)
    loaded = [parameter for name, parameter in model.named_parameters() if "lora" in name]
    assert sum(parameter.numel() for parameter in loaded) == sum(leaf.size for leaf in jax.tree.leaves(adapters))
    prompt = encode(PROCESSOR, "the red one", [(84, 56)])
    with torch.no_grad():
        theirs = model(**torch_inputs(prompt, PROCESSOR)).logits[0].numpy()
    with jax.set_mesh(make_mesh("1x1")):
        policy = merge(load_policy(config.run.dir, FLOAT32)[0])
        ours = prompt_logits(policy, PROCESSOR.batch([prompt], 8), ForwardConfig(DIMS, TRAIN, FLOAT32))[0]
        bare = prompt_logits(
            load_hf(config.model.path)[0], PROCESSOR.batch([prompt], 8), ForwardConfig(DIMS, TRAIN, FLOAT32)
        )[0]
    close(ours[: len(theirs)], theirs, 1e-4)
    assert np.abs(bare[: len(theirs)] - theirs).max() > 0.01 * np.abs(theirs).max(), "they change something"
    for load in (lambda: load_policy(out, FLOAT32), lambda: load_hf(out)):
        with jax.set_mesh(make_mesh("1x1")), pytest.raises(CheckpointError, match="holds adapters alone; expected a"):
            load()
    assert oct((out / "adapter_model.safetensors").stat().st_mode) == oct((out / "adapter_config.json").stat().st_mode)
    assert {value.dtype for value in load_file(out / "adapter_model.safetensors").values()} == {np.dtype("float32")}


def test_a_run_of_all_weights_has_no_adapters_to_write(
    run: tuple[Config, Adapters], tmp_path: Path, capsys: Any
) -> None:
    config, _ = run
    whole = configs.replace(config, **{"model.lora_rank": 0, "run.dir": str(tmp_path / "whole")})
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(tmp_path / "whole/checkpoints") as checkpoints:
        checkpoints.save(1, TrainState(random_policy(), (), jnp.int32(1)), {}, whole, Identity("", None))
        checkpoints.wait()
    assert export.main(["--run", whole.run.dir, "--out", str(tmp_path / "out"), "--adapters"]) == 2
    assert "learns all weights; expected one with model.lora_rank" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_are_not_put_on_other_weights(run: tuple[Config, Adapters]) -> None:
    config, _ = run
    with jax.set_mesh(make_mesh("1x1")):
        save_hf(random_policy(seed=9), DIMS, Path(config.model.path))
        with pytest.raises(CheckpointError, match="its adapters are for weights with fingerprint"):
            load_policy(config.run.dir, FLOAT32)


@pytest.mark.parametrize("kl_coef", [0.0, 0.01])
def test_a_run_has_one_policy_in_memory_that_does_not_learn(kl_coef: float, tmp_path: Path) -> None:
    changes = {"model.lora_rank": 8, "model.compute_dtype": "bfloat16", "grpo.kl_coef": kl_coef}
    config = configs.replace(Config(), **changes)
    with jax.set_mesh(make_mesh("1x1")) as _:
        job, state, reference = prepare(config, jax.sharding.get_mesh(), ALONE)
        if reference is not None:
            assert not any(leaf.any() for leaf in jax.tree.leaves(reference.blocks.adapters))
            bare = jax.tree.map(lambda x: x, reference)
            bare.blocks.adapters = None
            assert jax.tree.all(jax.tree.map(lambda ours, theirs: ours is theirs, bare, job.base))
        assert (reference is None) == (kl_coef == 0)
        assert {leaf.dtype for leaf in jax.tree.leaves(job.base)} == {BFLOAT16}
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {FLOAT32}
        assert job.loss_config.lora_scale == 32 / 8
        assert make_loss_config(Config(), ()).lora_scale is None
