"""Draw the glyphs that pixart-emoji was trained on as one picture, `glyphs.png`, in the order of `prompts.json`.

python bench/models/pixart-emoji/draw_glyphs.py    (needs Debian's fonts-noto-color-emoji, OFL 1.1)
"""

import json
from pathlib import Path

from PIL import Image
from train_pixart_emoji import SIZE, glyphs

COLUMNS = 41

if __name__ == "__main__":
    here = Path(__file__).parent
    names, images = zip(*glyphs())
    assert list(names) == json.loads((here / "prompts.json").read_text(encoding="utf-8")), "another version of the font"
    sheet = Image.new("RGB", (SIZE * COLUMNS, SIZE * -(-len(names) // COLUMNS)), "white")
    for i, image in enumerate(images):
        sheet.paste(Image.fromarray(image), (SIZE * (i % COLUMNS), SIZE * (i // COLUMNS)))
    sheet.save(here / "glyphs.png", optimize=True)
