"""Pictures that cannot be decoded: what Pillow raises, and what it says."""

import re

from PIL import Image

# On hostile or truncated files, from its format plugins up.
UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
_BUFFER = re.compile(r" <_io\.BytesIO object at \w+>")


def cause(error: BaseException) -> str:
    """What an error says, in one line.

    Pillow names a buffer by its address, which is another one for every picture and in every run.
    """
    return _BUFFER.sub("", " ".join(str(error).split()))
