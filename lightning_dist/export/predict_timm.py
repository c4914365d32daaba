"""Label image files with the network in this folder: python predict.py IMAGE..."""

import pathlib
import sys
from typing import Any

import timm
import torch
from PIL import Image, ImageOps

# Pillow hands a PostScript file, whatever its name, to the program Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def main() -> None:
    """Print one line for each image file: its path, the best class and its probability."""
    folder = pathlib.Path(__file__).parent
    network: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(network)
    transform: Any = timm.data.create_transform(**data, is_training=False)
    names = network.pretrained_cfg.get("label_names") or range(network.num_classes)
    for path in sys.argv[1:]:
        image = ImageOps.exif_transpose(Image.open(path, formats=FORMATS))
        image = image.convert("L" if data["input_size"][0] == 1 else "RGB")
        with torch.inference_mode():
            best = network(transform(image)[None]).softmax(1)[0].max(0)
        name = "".join(c if c.isprintable() else "?" for c in str(names[int(best.indices)]))
        print(path, name, f"{best.values:.4f}", sep=",")


if __name__ == "__main__":
    main()
