"""Load the tokenizer of a model, and turn the many errors of that into one message."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hqqtrain.common.errors import UserError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `folder`, without running code from the folder.

    Raises:
        UserError: The folder has no tokenizer, or the installed libraries cannot read it.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust library raises plain `Exception`
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"{folder}: its tokenizer cannot be loaded ({reason}). If the folder has no tokenizer "
            "files, copy those of the model that it was made from."
        ) from error
