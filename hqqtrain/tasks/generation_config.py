"""The generation settings of a model that was trained to end its turns with a token of its own.

Programs that generate text stop at the tokens of `eos_token_id` in generation_config.json. A base
model has the end of a document there. After a training on chats it ends its turns with another
token, such as `<|im_end|>`, and would write the next turn, too, if that token is not in the list.
"""

import logging
from typing import Any

from hqqtrain.common.files import without_nonfinite
from hqqtrain.common.reading import read_json
from hqqtrain.data.chat.end_markers import end_markers
from hqqtrain.data.chat.markers import single_id
from hqqtrain.data.chat.template import ChatTemplate
from hqqtrain.data.loader import DataLoader
from hqqtrain.formats.companions import GENERATION_CONFIG
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_FROM_CONFIG = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys that transformers reads from config.json if a model has no generation_config.json."""


def trained_generation_config(plan: ModelPlan, loader: DataLoader) -> dict[str, Any] | None:
    """Return the generation settings of the trained model; None: they are those of its base.

    The tokens with which the chat template ends a turn join `eos_token_id`, if they were trained.
    Only rank 0 may call this, because only it may ask the loader.

    Args:
        plan: The plan of the model, whose tokenizer has the chat template of the training.
        loader: The loader of the training data.
    """
    tokenizer = load_tokenizer(plan.source.tokenizer)
    if not tokenizer.chat_template:
        return None
    settings = {key: getattr(plan.hf_config, key, None) for key in _FROM_CONFIG}
    settings = {key: value for key, value in settings.items() if value is not None}
    # A file that anybody wrote may have NaN, which cannot be written, and anything as EOS.
    settings |= without_nonfinite(read_json(plan.source.tokenizer / GENERATION_CONFIG))
    eos = settings.get("eos_token_id")
    eos = [id for id in (eos if isinstance(eos, list) else [eos]) if type(id) is int]
    markers = end_markers(ChatTemplate(tokenizer))
    found = ((single_id(marker, tokenizer), marker) for marker in markers)
    ids = {id: marker for id, marker in found if id is not None and id not in eos}
    new = {id: marker for id, marker in ids.items() if loader.trains(id)}
    if not new:
        return None
    settings["eos_token_id"] = [*eos, *new]
    logger.info(
        "%s: the model was trained to end its turns with %s, so eos_token_id is %s in adapter/ and "
        "in exports",
        GENERATION_CONFIG, " and ".join(new.values()), settings["eos_token_id"],
    )  # fmt: skip
    return settings
