"""Match the tensors of a checkpoint with those of a model, as transformers' `from_pretrained` does.

Many checkpoints name their tensors differently from the model in memory, and transformers renames
them: GPT-NeoX stores `embed_out.weight` for `lm_head.weight`. Other checkpoints store one tensor of
a tied pair, or two tensors of different values although the configuration ties them. Each case has
to give the same model here and in transformers.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from hqqtrain.models.fqn import base_model, expected_shapes, tied_names, untie_weight
from hqqtrain.models.weights.base import NameMatch

SameValues = Callable[[str, str], bool]
"""Whether two tensors of the checkpoint, given by their stored names, have the same values."""


def match_names(model: nn.Module, stored_names: Iterable[str], same: SameValues) -> NameMatch:
    """Match the dense checkpoint with `stored_names` to `model`, and untie parameters in `model`.

    A parameter is untied if the checkpoint has other values for it than for the parameter that it
    is tied to.

    Args:
        model: Causal language model, not sharded yet. Its linears may be quantized.
        stored_names: Names of all tensors of the checkpoint.
        same: Compares two tensors of the checkpoint.
    """
    root = base_model(model)
    tied = tied_names(root)
    expected = dict.fromkeys([*expected_shapes(root), *tied, *tied.values()], "")
    rename = _renamer(root, expected)
    stored: dict[str, str] = {}
    converted: dict[str, str] = {}
    # As in transformers, the first of several tensors of the same name is used.
    for stored_name in sorted(stored_names, key=dot_natural_key):
        name, needs_conversion = rename(stored_name)
        if name in expected:
            (converted if needs_conversion else stored).setdefault(name, stored_name)
    duplicates = _resolve_ties(root, stored, same)
    return NameMatch(stored, converted, duplicates)


def match_packed_names(
    model: nn.Module, stored_names: Iterable[str], same: SameValues
) -> NameMatch:
    """Match a packed checkpoint, whose names are those of the model; see `match_names`."""
    stored = {name: name for name in stored_names}
    return NameMatch(stored, duplicates=_resolve_ties(base_model(model), stored, same))


def _renamer(model: PreTrainedModel, expected: dict[str, str]) -> Callable[[str], tuple[str, bool]]:
    """Return a function that maps a stored name to (name in the model, whether it is converted)."""
    transforms = get_model_conversion_mapping(model)
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    prefix = model.base_model_prefix

    def rename(stored_name: str) -> tuple[str, bool]:
        name, pattern = rename_source_key(stored_name, renamings, converters, prefix, expected)
        if name not in expected and stored_name in expected:
            # The checkpoint has the name of the model already.
            name, pattern = rename_source_key(stored_name, [], [], prefix, expected)
        return name, pattern is not None

    return rename


def _resolve_ties(
    model: PreTrainedModel, stored: dict[str, str], same: SameValues
) -> frozenset[str]:
    """Complete `stored` for tied parameters, untie those with other values, return duplicates."""
    duplicates = set()
    tied = tied_names(model)
    for target, source in tied.items():
        if source not in stored:
            # A checkpoint may have any parameter of the group in place of the source.
            group = (name for name, other in tied.items() if other == source and name in stored)
            if (stand_in := next(group, None)) is None:
                continue
            stored[source] = stored[stand_in]
        own = stored.get(target, stored[source])
        if own == stored[source]:
            stored[target] = own
        elif same(own, stored[source]):
            stored[target] = stored[source]
            duplicates.add(own)
        else:
            untie_weight(model, target)
    return frozenset(duplicates)


def missing_message(
    folder: Path,
    missing: Sequence[str],
    expected: Collection[str],
    names: Sequence[str],
    match: NameMatch,
) -> str:
    """Return the message for tensors of a model that its checkpoint lacks.

    Args:
        folder: The folder of the checkpoint.
        missing: Names in the model of the missing tensors.
        expected: Names in the model of all its tensors.
        names: Names of all tensors of the checkpoint.
        match: The match of the names.
    """
    where = f"{folder}: {len(missing)} of {len(expected)} tensors are missing, among them"
    if match.converted:
        name, stored_name = next(iter(match.converted.items()))
        return (
            f"{where} {missing[0]}. transformers computes {name} from {stored_name} and other "
            "tensors when it loads this checkpoint, which is not supported yet. Load the model "
            "with transformers' from_pretrained, save it with save_pretrained(FOLDER, "
            "save_original_format=False) and copy the tokenizer; such a folder has the tensors of "
            "the model as they are."
        )
    used = {match.stored.get(name) for name in expected} | match.duplicates
    unused = [name for name in names if name not in used]
    if unused and len(missing) >= len(expected) / 2:
        return (
            f"{where} {missing[0]}. The names in the checkpoint (such as {unused[0]}) are not "
            "those of the architecture in config.json, and transformers knows no other names for "
            "it. Use the config.json of these weights."
        )
    hint = f" Tensors such as {unused[0]} are not used." if unused else ""
    return (
        f"{where} {missing[0]}. config.json describes a model with this tensor, but no file of the "
        f"folder contains it.{hint} Use the config.json that was saved with these weights, or the "
        "weights that belong to this config.json."
    )
