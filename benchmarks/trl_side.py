"""TRL's side of ``benchmarks/trl_step.py``: its ``GRPOTrainer`` on the toy world, with the toy run's settings."""

import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from trl import GRPOConfig, GRPOTrainer

from segzero_jax import config as configs
from segzero_jax import rewards
from segzero_jax.config import Config
from segzero_jax.data.pipeline import open_split
from segzero_jax.hub import TOY
from segzero_jax.prompt import question_text
from segzero_jax.scoring import solution
from segzero_jax.types import Frame


class StepTimes(TrainerCallback):
    """Records the seconds of every step, including sampling and rewards."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def load_processor(config: Config) -> Qwen2_5_VLProcessor:
    """The toy checkpoint's tokenizer, image settings and chat template, as transformers' own processor."""
    tokenizer = AutoTokenizer.from_pretrained(TOY, padding_side="left")
    pixels = config.data.image_size**2
    images = Qwen2VLImageProcessorPil.from_pretrained(TOY, min_pixels=pixels, max_pixels=pixels)
    chat = tokenizer.chat_template
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=chat)


def load_rows(config: Config, count: int) -> Dataset:
    """The toy training split as conversations with an image."""
    split = open_split("toy", "train", Path(config.data.dir).expanduser())
    frame, rows = Frame(config.data.image_size, config.data.image_size), []
    for index in range(count):
        example = split[index]
        text = question_text(config.data.prompt, example.question)
        rows.append(
            {
                "prompt": [{"role": "user", "content": text}],
                "image": Image.open(io.BytesIO(example.image)).convert("RGB").resize((frame.width, frame.height)),
                "solution": solution(example, frame, config.reward.recipe),
            }
        )
    return Dataset.from_list(rows)


def reward(completions: list[Any], solution: list[str], **_: Any) -> list[float]:
    """The toy run's recipe without its mask component."""
    texts = [completion[0]["content"] for completion in completions]
    recipe = Config().reward.recipe
    return [rewards.score(recipe, text, target, None, 0.0).total for text, target in zip(texts, solution, strict=True)]


def main() -> None:
    steps, image_size, prompts, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    changes = {"data.image_size": image_size, "train.batch_size": prompts, "train.micro_batch_size": prompts}
    config, times = configs.replace(Config(), **changes), StepTimes()
    batch = config.train.batch_size * config.rollout.group_size
    rows = batch if image_size == Config().data.image_size else config.rollout.group_size
    with tempfile.TemporaryDirectory() as directory:
        arguments = GRPOConfig(
            output_dir=directory,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=batch // rows,
            num_generations=config.rollout.group_size,
            max_completion_length=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            beta=config.grpo.kl_coef,
            loss_type="dapo",
            learning_rate=config.train.lr,
            lr_scheduler_type="constant",
            max_grad_norm=config.train.max_grad_norm,
            weight_decay=config.train.weight_decay,
            gradient_checkpointing=False,
            max_steps=steps,
            seed=config.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=Qwen2_5_VLForConditionalGeneration.from_pretrained(TOY, dtype=torch.float32),
            reward_funcs=reward,
            args=arguments,
            train_dataset=load_rows(config, config.train.batch_size * steps),
            processing_class=load_processor(config),
            callbacks=[times],
        )
        trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    lengths = [row["completions/mean_length"] for row in logged]
    print(json.dumps({"seconds": times.seconds, "lengths": lengths, "rewards": [row["reward"] for row in logged]}))


if __name__ == "__main__":
    main()
