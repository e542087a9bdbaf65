"""Makes the toy policy's tokenizer and image settings: python scripts/make_toy_tokenizer.py [DIR]

A byte-level BPE like Qwen2.5's (NFC, its split expression, single digits, its 22 added tokens in its order at the end)
with 512 ids in all, its merges learnt from the toy world. Deterministic: the same files come out every time.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from segzero_jax.data.scenes import SPLITS, sample_scene

VOCABULARY = 512
# Qwen2's split expression, as in the tokenizer.json of every Qwen2.5 checkpoint.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = """
<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|>
<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
"""
# Also added to Qwen2.5's vocabulary, but ordinary text to a decoder that skips special tokens.
ADDED = """
<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
"""
# Words that the toy world does not use, for prompts in other words.
OTHER_WORDS = """
Please find the object in this picture that is next to, near or between others and compare them: which one is the same
size or colour as another? The thinking process goes first, then the final answer in JSON format with boxes and points.
In a corner or at the centre, inside it or touching, big or small, bright or dark: describe every object, then choose.
"""
# The layout of Qwen2.5-VL's chat for text and images, with its default system turn.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string %}{{ message.content }}{% else -%}
{%- for part in message.content -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
TOKENIZER_CONFIG = {
    "tokenizer_class": "Qwen2Tokenizer",
    "add_prefix_space": False,
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1024,
    "chat_template": CHAT_TEMPLATE,
}
IMAGE_CONFIG = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 3136,
    "max_pixels": 12845056,
}


def corpus(scenes: int = 2000) -> Iterator[str]:
    """Chat scaffolding, questions, reasoning and answers of the toy world, in proportion to their use."""
    yield OTHER_WORDS
    for index in range(scenes):
        split = SPLITS[index % len(SPLITS)]
        scene, question = sample_scene(split, np.random.default_rng([VOCABULARY, index]))
        answer = scene.objects[question.answer]
        box = ",".join(str(v // 2) for v in answer.box)
        point = ",".join(str(v // 2) for v in answer.point)
        yield "system\nYou are a helpful assistant."
        yield "user\n"
        yield "assistant\n"
        yield f'Find "{question.text}".'
        yield f"<think> {question.reasoning} </think>\n<answer>"
        yield f"<think> {question.reasoning} </think><answer>"
        for spaced in (f'{{"bbox_2d": [{box}], "point_2d": [{point}]}}', f'{{"bbox_2d":[{box}],"point_2d":[{point}]}}'):
            yield f"<answer>[{spaced}]</answer>"
            yield f"<answer>[{spaced}, {spaced},{spaced}]</answer>"


def build(lines: Iterator[str]) -> Tokenizer:
    """Trains the merges and appends Qwen2.5's added tokens, so that the vocabulary has 512 ids."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    learnt = VOCABULARY - len(SPECIAL.split()) - len(ADDED.split())
    trainer = BpeTrainer(
        vocab_size=learnt,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(lines, trainer)
    if tokenizer.get_vocab_size() != learnt:
        raise SystemExit(f"the corpus has merges for {tokenizer.get_vocab_size()} ids, expected {learnt}")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL.split()])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ADDED.split()])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "segzero_jax" / "assets" / "toy_policy"
    parser.add_argument(
        "dir", metavar="DIR", nargs="?", type=Path, default=default, help="where to write [%(default)s]"
    )
    directory = parser.parse_args().dir
    directory.mkdir(parents=True, exist_ok=True)
    build(corpus()).save(str(directory / "tokenizer.json"))
    for name, content in (("tokenizer_config.json", TOKENIZER_CONFIG), ("preprocessor_config.json", IMAGE_CONFIG)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote tokenizer.json, tokenizer_config.json and preprocessor_config.json to {directory}")


if __name__ == "__main__":
    main()
