"""Checks of a configuration as a whole: pairs of keys that do not fit together, and things a run will not do."""

from segzero_jax.config.schema import ASKED, LIST_FORM, ONE_FORM, QUESTION, Config, ConfigError, RewardConfig

_BARE = f"{ONE_FORM} and no reasoning"
# The answer format that a recipe scores; sam_r1 scores both LIST_FORM and ONE_FORM.
_SCORED = {
    "seg_zero_soft": ONE_FORM,
    "seg_zero_strict": ONE_FORM,
    "seg_zero_soft_accuracy": ONE_FORM,
    "seg_zero_no_thinking": _BARE,
    "vision_reasoner": LIST_FORM,
}


def notes(config: Config) -> list[str]:
    """A line for each thing that a run will not do although its configuration suggests it."""
    train, each, found = config.train, config.updates_per_rollout, []
    if config.steps_that_learn < train.steps:
        found.append(
            f"after step {config.steps_that_learn} of {train.steps} the learning rate is 0: train.decay_steps="
            f"{train.decay_steps} counts updates, of which a step makes {each}"
        )
    if train.steps * each < train.warmup_steps:
        found.append(
            f"the learning rate stays below train.lr={train.lr:g}: train.warmup_steps={train.warmup_steps} counts "
            f"updates, of which {train.steps} steps make {train.steps * each}"
        )
    if train.decay_steps and train.lr_decay == "none":
        found.append(f"the learning rate does not fall: train.decay_steps={train.decay_steps} has no train.lr_decay")
    if config.reward.mask_iou_weight and config.reward.server == "none":
        found.append(
            f"masks are not scored: reward.mask_iou_weight={config.reward.mask_iou_weight:g} has no reward.server"
        )
    if each == 1 and config.grpo.clip_low != config.grpo.clip_high:
        found.append(
            f"nothing is clipped: grpo.clip_high={config.grpo.clip_high:g} acts from a rollout's second update on, "
            "of which a step makes one (train.mini_batch_size, grpo.iterations)"
        )
    if _toy_scores(config.reward):
        asked = [
            *config.data.names,
            *(text.rpartition("/")[0] or config.data.names[0] for text in config.data.eval_splits),
        ]
        others = dict.fromkeys(name for name in asked if name != "toy")
        if others:
            found.append(
                f"masks of {', '.join(others)} mean nothing: reward.local_model=toy knows the toy set's pictures alone"
            )
    return found


def check_answer_form(config: Config) -> None:
    """Raises ConfigError if the recipe scores another answer format than the wording asks for.

    Training would earn almost no reward. A configuration that is only read may have such a pair: a policy can be asked
    in another wording than it was trained with.
    """
    prompt, recipe = config.data.prompt, config.reward.recipe
    asked = ASKED.get(prompt)
    if asked is None:  # Only the author of a custom wording knows.
        return
    scored = _SCORED.get(recipe, asked)
    if asked != scored:
        recipes = " or ".join(name for name in (*_SCORED, "sam_r1") if _SCORED.get(name, asked) == asked)
        prompts = " or ".join(name for name, form in ASKED.items() if form == scored) or f"a text with {QUESTION}"
        raise ConfigError(
            f"data.prompt={prompt}: asks for {asked}, reward.recipe={recipe} scores {scored}; expected "
            f"reward.recipe={recipes}, or data.prompt={prompts}"
        )


def check_local_model(config: Config) -> None:
    """Raises ConfigError if a local server would score images that its SAM 2 does not know.

    Only code that starts such a server calls this: policies of earlier runs with this setting can still be asked.
    """
    if _toy_scores(config.reward) and "toy" not in config.data.names:
        raise ConfigError(
            f"reward.local_model=toy: knows the toy set's pictures alone, data.name={config.data.name} has others; "
            "expected another SAM 2 for reward.server=local, such as --reward.local_model=facebook/sam2.1-hiera-large, "
            "or reward.server=none"
        )


def _toy_scores(reward: RewardConfig) -> bool:
    return reward.server == "local" and reward.local_model == "toy"
