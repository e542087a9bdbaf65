"""The size that the Hugging Face processor brings a picture to; our own squashes all to one square."""

from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

# As preprocessor_config.json of the released checkpoints has them, and the toy's.
LIMITS = {"min_pixels": 3136, "max_pixels": 12845056}


def hub_size(picture: Image.Image) -> tuple[int, int]:
    """(width, height) in whole merged units of 28 pixels, the aspect ratio nearly kept."""
    height, width = smart_resize(picture.height, picture.width, factor=28, **LIMITS)
    return width, height
