"""The benchmarks' two sides compute the same thing, and what they say of hardware is counted right."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    gpu,
    gpu_on_paper,
    group_cost,
    learning_phase,
    reward_server,
    rollout_speed,
    scaling,
    tpu_on_paper,
    trl_step,
)
from benchmarks.peer_group import SPECIAL, TEXT, VISION, Settings, Shape, Side, Unequal, at_least, side, sides, write
from benchmarks.reward_requests import picture, prompts
from reward_server import reward_pb2
from reward_server.segmenter import Segmenter
from segzero_jax.mesh import make_mesh
from segzero_jax.model.dims import Dims, from_hf
from segzero_jax.plan.phases import PhasePlan

SMALL = Shape(prompt=60, response=12, group=3, image=112)


def dims() -> Dims:
    return from_hf({"model_type": "qwen2_5_vl", **TEXT, **SPECIAL, "vision_config": VISION})


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("group")
    write(directory, SMALL)
    return directory


@pytest.fixture(scope="module")
def two(group: Path) -> Iterator[tuple[Side, Side]]:
    with sides(group, Settings(cores=1)) as both:
        yield both


def test_greedy_tokens_and_then_loss_and_gradients_are_equal(two: tuple[Side, Side], tmp_path: Path) -> None:
    rollout_speed.compare(*two, tokens=8)
    found = rollout_speed.measure(*two, tokens=8, rounds=1, group=SMALL.group)
    assert found["ours"].keys() == found["peer"].keys()
    # A step changes the weights: what is compared first has to be equal still.
    apart = learning_phase.compare(*two, tmp_path)
    assert apart.keys() == learning_phase.LIMITS.keys()
    times = learning_phase.measure(*two, rounds=1)
    assert times["ours"]["old"] == 0 < times["peer"]["old"]


def test_other_weights_are_noticed(two: tuple[Side, Side], group: Path, tmp_path: Path) -> None:
    """Each side on its own checkpoint: no times are to be had."""
    other = tmp_path / "other"
    write(other, SMALL, seed=1)
    (other / "group.npz").write_bytes((group / "group.npz").read_bytes())
    mine, _ = two
    with side("benchmarks.torch_side", other, Settings(cores=1)) as theirs:
        with pytest.raises(Unequal, match="response 0 differs"):
            rollout_speed.compare(mine, theirs, tokens=8)
        with pytest.raises(Unequal, match=r"\w+ differ by"):
            learning_phase.compare(mine, theirs, tmp_path)


def test_a_missing_peer_is_named_with_its_extra() -> None:
    code = "from benchmarks.peer_group import need; need('bench', 'json', 'no_such_peer')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "no_such_peer is not installed: pip install -e '.[bench]' -c constraints.txt\n"


HIDING = """
import importlib.util, runpy, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "{module}" else real(name, *rest)
sys.modules["{module}"] = None
sys.argv[:] = ["{name}"]
runpy.run_module("benchmarks.{name}", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("learning_phase", "torch", "reward,dev"),
        ("rollout_speed", "transformers", "reward,dev"),
        ("trl_step", "trl", "bench"),
        ("reward_server", "omegaconf", "reward"),
        ("gpu", "torch", "reward,dev"),
        ("gpu_on_paper", "jax_plugins", "cuda"),
        ("tpu_on_paper", "libtpu", "dev"),
        ("prefix_flops", "libtpu", "dev"),
        ("scaling", "libtpu", "dev"),
    ],
)
def test_each_benchmark_says_what_it_lacks(name: str, module: str, extra: str) -> None:
    code = HIDING.format(name=name, module=module)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stderr == f"{module} is not installed: pip install -e '.[{extra}]' -c constraints.txt\n"
    assert (done.returncode, done.stdout) == (1, "")


def test_responses_that_repeat_one_token_are_no_comparison() -> None:
    """They would be equal though the caches behind them were lost."""
    dull = lambda *_, **__: {"tokens": [[7] * 8]}  # noqa: E731
    with pytest.raises(Unequal, match=r"response 0 repeats itself, 1 distinct tokens of 8"):
        rollout_speed.compare(dull, dull, tokens=8)  # type: ignore[arg-type]


def test_a_trainer_that_does_less_gets_no_time() -> None:
    theirs = {"lengths": 48.0, "rewards": 4.6}
    trl_step.compare({"lengths": 47.0, "rewards": 4.7}, theirs)
    for less in ({"lengths": 5.0, "rewards": 4.6}, {"lengths": 48.0, "rewards": 1.0}):
        with pytest.raises(Unequal, match=r"expected at most"):
            trl_step.compare(less, theirs)


@pytest.mark.parametrize("differs", ["loss", "kl", "grad_norm"])
def test_shared_and_repeated_prompts_are_compared(differs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that leaves part of the gradient out has the same loss."""
    same = {"loss": 1.0, "kl": 0.1, "grad_norm": 2.0}
    rows = {"shared": same, "repeated": same | {differs: 4.0}}
    monkeypatch.setattr(group_cost, "run", lambda shape, layout, dims: rows[layout])
    with pytest.raises(Unequal, match=rf"group 1: {differs} .* shared, 4 repeated"):
        group_cost.measure(dims())


def test_too_few_rounds_are_refused_before_anything_is_measured() -> None:
    assert at_least(3)("3") == 3
    for text in ("2", "-1", "x", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text}: expected a whole number, 3 or more"):
            at_least(3)(text)


def test_a_plan_that_does_not_fit_has_a_line_all_the_same() -> None:
    fits = PhasePlan("rollout", 1, 1.0, 2.0, 3.0, 6.0, True, 1e12, 1e9, {"all-gather": 1e9}, 0.5, "HBM")
    over = PhasePlan("update", 1, 0.0, 20.0, 3.0, 23.0, False)
    plan = {
        "topology": "v5e:4x4", "mesh": "4x4", "hbm_limit_gib": 15.75, "fits": False, "seconds_per_step": None,
        "samples_per_second_per_chip": None, "phases": [asdict(fits), asdict(over)],
    }  # fmt: skip
    assert scaling.table(plan).splitlines()[-2:] == [
        "| rollout | 1 | 6.00 | 1 | 1 | 1 | 0.50 | HBM |",
        "| update | 1 | 23.00 | ? | ? | ? | ? | ? |",
    ]
    assert scaling.summary("it", plan) == "| it | v5e:4x4 | 4x4 | 23.00 of 15.75 in update: does not fit | - | - | - |"
    assert tpu_on_paper.line("it", plan).split() == [
        "it",
        "-",
        "-",
        "DOES",
        "NOT",
        "FIT:",
        "update",
        "takes",
        "23.00",
        "GiB",
    ]


def test_a_plan_s_line_adds_up_what_is_waited_for() -> None:
    phases = [PhasePlan("decode", 4, 1, 1, 1, 3, True, 1e12, 1e9, {}, 0.5, "HBM", 0.25)]
    phases += [PhasePlan("update", 1, 1, 1, 1, 3, True, 1e12, 1e9, {}, 3.0, "compute", 0.5)]
    plan = {"fits": True, "seconds_per_step": 5.0, "samples_per_second_per_chip": 1.6, "phases": [*map(asdict, phases)]}
    assert " ".join(tpu_on_paper.line("it", plan).split()) == (
        "it 5.0 1.60 decode 2.00 (HBM), update 3.00 (compute); waits 1.50"
    )


def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, check=False, env={"PATH": ""}
    )
    assert (done.returncode, done.stderr) == (1, "no GPU here: expected one that PyTorch and JAX see\n")


GPU_PROGRAM = """HloModule gpu

%gate (a: bf16[8,4], b: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[8,4]{1,0} parameter(1)
  ROOT %c = bf16[8,4]{1,0} multiply(%a, %b)
}

ENTRY %main (x: bf16[8,4], w: bf16[4,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %w = bf16[4,4]{1,0} parameter(1)
  %y.1 = bf16[8,4]{1,0} custom-call(%x, %w), custom_call_target="__cublas$lt$matmul"
  %z.2 = bf16[8,4]{1,0} custom-call(%y.1, %y.1, %y.1), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %loop_multiply_fusion.7 = bf16[8,4]{1,0} fusion(%y.1, %z.2), kind=kLoop, calls=%gate
}
"""


def test_bytes_that_a_program_moves_are_told_by_what_they_are_moved_for() -> None:
    one = 2 * 8 * 4
    expected = {"products": 2 * one + 2 * 4 * 4, "attention": 4 * one, "loop multiply fusion": 3 * one}
    assert gpu_on_paper.moved(GPU_PROGRAM) == expected


def test_a_side_on_a_gpu_that_does_not_learn_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextmanager
    def side(module: str, directory: Path, settings: Settings) -> Iterator[Callable[..., dict[str, float]]]:
        yield lambda what: {"loss": -0.3, "kl": 0.9, "grad_norm": float("nan"), "update": 0.1}

    monkeypatch.setattr(gpu, "side", side)
    with pytest.raises(Unequal, match=r"^ours: loss, KL or gradient is not finite: .*'grad_norm': nan"):
        gpu.measure("ours", tmp_path, Settings(), rounds=1)


def test_a_padded_question_is_the_same_question() -> None:
    group = group_cost.make_group(Shape(prompt=60, response=12, group=3, image=112), np.random.default_rng(0))
    alone, padded = group_cost.read_prompt(group), group_cost.read_prompt(group, 16)
    assert padded.tokens_bp.shape == (1, 64)
    assert padded.length_b.tolist() == alone.length_b.tolist() == [60]
    assert (padded.tokens_bp[:, :60] == alone.tokens_bp).all()
    assert (padded.image_index_bp[:, 60:] == -1).all()


def test_flops_of_a_group_are_the_compilers() -> None:
    """XLA counts loop bodies once, so the count is compared where every loop runs once: one block, one chunk."""
    import jax
    import jax.numpy as jnp

    from segzero_jax.mesh import TRAIN
    from segzero_jax.model.policy import ForwardConfig, Policy
    from segzero_jax.plan.cost import Program

    shape = Shape(prompt=60, response=12, group=3, image=112)
    with jax.set_mesh(make_mesh("1x1")):
        policy = jax.eval_shape(lambda: Policy(dims(), TRAIN, jax.random.key(0)))
        prompt = group_cost.read_prompt(group_cost.make_group(shape, np.random.default_rng(0)))
        tokens = np.zeros((1, shape.group, shape.response), np.int32)
        loss = group_cost.LossConfig(group_cost.GrpoConfig(), 1.0, (), False, shape.response)
        fwd = ForwardConfig(dims(), TRAIN, jnp.dtype("float32"))
        compiled = group_cost.policy_logps.lower(policy, prompt, tokens, fwd=fwd, loss_config=loss).compile()
    # Attention computes the causal half too, and embeddings are placed by matrices: at these sizes a few per cent.
    assert Program(compiled.as_text()).cost.flops == pytest.approx(gpu.forward_flops(dims(), shape), rel=0.1)


def test_a_decode_step_reads_weights_and_caches() -> None:
    weights = 8 * (512 * 512 * 2 + 512 * 128 * 2 + 3 * 512 * 1536) + 8192 * 512
    assert gpu.language_weights(dims()) == weights - 8192 * 512
    cache = 2 * 8 * 2 * 64 * (1150 + 8 * 64)
    assert gpu.decode_bytes(dims(), Shape(), 128) == 2 * (weights + cache)


@pytest.mark.parametrize("narrow", [False, True])
def test_answers_are_right_within_rounding_and_no_further(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model says in float32 is right beside the predictor in bfloat16 too; a wider mask is not."""
    segmenter = Segmenter.load("toy", "cpu")
    embedding = segmenter.embed([picture(0).image])[0]
    decoded = segmenter.decode(embedding, prompts(0, reward_server.GROUP))
    masks = segmenter.masks(decoded.logits, embedding.height, embedding.width).numpy()
    if narrow:
        monkeypatch.setattr(segmenter, "dtype", "bfloat16")
        monkeypatch.setattr(segmenter, "_precision", lambda: torch.autocast("cpu", torch.bfloat16))
    right = reward_server.right_masks(segmenter, groups=1)[0]
    target = picture(0).objects[0].mask

    def fits(number: int, mask: np.ndarray) -> bool:
        counts = {"intersection": int((mask & target).sum()), "union": int((mask | target).sum())}
        return any(one.has(reward_pb2.CandidateScore(**counts), target) for one in right[number])

    assert all(fits(number, mask) for number, mask in enumerate(masks))
    assert not any(fits(number, mask | np.roll(mask, 12, axis=1)) for number, mask in enumerate(masks))
