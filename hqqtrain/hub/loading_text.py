"""How to load a pushed result, as the Markdown of its model card. A test runs what Python can."""

_PACKED = """```python
import hqqtrain  # lets transformers load the packed weights; without it they are refused
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""

_DENSE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""

_SUBFOLDER = """The adapter of the training is in `adapter/`:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "{name}", subfolder="adapter")
```"""

_VLLM = """```bash
vllm serve {name}
```"""

_VLLM_ADAPTER = """The adapter of the training is in `adapter/`:

```bash
hf download {name} --local-dir model
vllm serve model{vllm_options}
```"""

_MLX = """```bash
mlx_lm.generate --model {name} --prompt "Hello"
```"""

_MLX_ADAPTER = """The adapter of the training is in `adapter/`:

```bash
hf download {name} --local-dir model
mlx_lm.generate --model model --adapter-path model/adapter --prompt "Hello"
```"""

_GGUF = """```bash
llama-cli -hf {name}
ollama run hf.co/{name}
```"""

_GGUF_ADAPTER = """The adapter of the training is `adapter.gguf`:

```bash
hf download {name} --local-dir model
llama-cli -m model/{file} --lora model/adapter.gguf
```"""

_EXPORTS = {
    "packed": (_PACKED, _SUBFOLDER),
    "dense": (_DENSE, _SUBFOLDER),
    "hqq": (f"With transformers 4.57 and hqq:\n\n{_DENSE}", _SUBFOLDER),
    "mlx": (_MLX, _MLX_ADAPTER),
    "humming": (_VLLM, _VLLM_ADAPTER),
    "compressed-tensors": (_VLLM, _VLLM_ADAPTER),
    "gguf": (_GGUF, _GGUF_ADAPTER),
}
"""Export format -> how to load the model, and its separate adapter."""


def how_to_load_model(name: str) -> str:
    """Return how to load the quantized model in the repository `name`."""
    return _PACKED.format(name=name)


def how_to_load_export(
    name: str, export_format: str, *, has_adapter: bool, file: str = "", vllm_options: str = ""
) -> str:
    """Return how to load an export.

    Args:
        name: The repository.
        export_format: A value of `export.format`.
        has_adapter: Whether it contains a separate adapter.
        file: The name of the GGUF file, if it is one.
        vllm_options: The options of `vllm serve` for the adapter in `model/adapter`.
    """
    model, adapter = _EXPORTS[export_format]
    text = f"{model}\n\n{adapter}" if has_adapter else model
    return text.format(name=name, file=file, vllm_options=vllm_options)


def how_to_load_adapter(
    name: str, base: str, *, is_quantized: bool, has_tokenizer: bool, has_new_tokens: bool
) -> str:
    """Return how to load an adapter on its base.

    Args:
        name: The repository of the adapter.
        base: The repository of its base.
        is_quantized: Whether hqqtrain has quantized the base.
        has_tokenizer: Whether the repository of the adapter has the tokenizer of the training.
        has_new_tokens: Whether the adapter has embeddings of tokens that the base lacks.
    """
    imports = ["from peft import PeftModel",
               "from transformers import AutoModelForCausalLM, AutoTokenizer"]  # fmt: skip
    if is_quantized:
        imports.insert(0, "import hqqtrain  # lets transformers and PEFT load packed weights")
    lines = [
        *imports,
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name if has_tokenizer else base}")',
    ]
    if has_new_tokens:
        lines.append("model.resize_token_embeddings(len(tokenizer))")
    refused = "  # refused on any other base" if is_quantized else ""
    lines.append(f'model = PeftModel.from_pretrained(model, "{name}"){refused}')
    return "```python\n{}\n```".format("\n".join(lines))
