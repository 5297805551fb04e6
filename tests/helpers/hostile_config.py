"""Hostile and broken values of the command line and of recipes."""

from collections.abc import Callable

from hostile import Case, Inputs


def _recipe(content: str | bytes, *words: str) -> Callable[[Inputs], list[str]]:
    """Return what writes a recipe of the user with this content."""

    def make(inputs: Inputs) -> list[str]:
        folder = inputs.folder / "recipes"
        folder.mkdir()
        data = content.encode() if isinstance(content, str) else content
        (folder / "mine.yaml").write_bytes(data)
        return ["recipe=mine", *words]

    return make


BOMB = "a: &a [1,2,3,4,5,6,7,8,9]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
"""YAML of some hundred bytes whose aliases stand for 9**9 numbers."""

CASES = {
    "nbits that nobody has": Case(["quant.nbits=5"], ("quant.nbits=5", "8, 4, 3, 2, 1")),
    "nbits in words": Case(["quant.nbits=two"], ("quant.nbits", "two")),
    "nbits with a fraction": Case(["quant.nbits=2.5"], ("quant.nbits=2.5",)),
    "group_size 0": Case(["quant.group_size=0"], ("quant.group_size=0",)),
    "group_size negative": Case(["quant.group_size=-64"], ("quant.group_size=-64",)),
    "group_size huge": Case(["quant.group_size=1000000007"], ("quant.group_size",)),
    "group_size that divides nothing": Case(["quant.group_size=48"], ("quant.group_size=48",)),
    "axis": Case(["quant.axis=-1"], ("quant.axis=-1",)),
    "solver with code": Case(["quant.solver=__import__"], ("quant.solver=__import__",)),
    "dtype": Case(["quant.meta_dtype=int8"], ("quant.meta_dtype=int8",)),
    "everything skipped": Case(["quant.skip=['*']"], ("quant.skip",)),
    "skip is no pattern": Case(["quant.skip=['[']"], ("quant.skip", "[")),
    "override with a wrong value": Case(
        ["quant.overrides={*.q_proj:{nbits:9}}"], ("quant.overrides", "nbits")
    ),
    "override with a wrong key": Case(
        ["quant.overrides={*.q_proj:{nbit:4}}"], ("quant.overrides", "nbit")
    ),
    "override that matches nothing": Case(
        ["quant.overrides={*.w1:{nbits:4}}"], ("quant.overrides", "*.w1")
    ),
    "rank 0": Case(["adapter.r=0"], ("adapter.r=0",)),
    "alpha infinite": Case(["adapter.alpha=inf"], ("adapter.alpha",)),
    "dropout above 1": Case(["adapter.dropout=2"], ("adapter.dropout=2",)),
    "no target": Case(["adapter.target_modules=[]"], ("adapter.target_modules",)),
    "target that matches nothing": Case(
        ["adapter.target_modules=[w1]"], ("adapter.target_modules", "w1")
    ),
    "negative steps": Case(["train.max_steps=-1"], ("train.max_steps=-1",)),
    "steps in words": Case(["train.max_steps=many"], ("train.max_steps", "many")),
    "epochs NaN": Case(["train.max_steps=null", "train.epochs=nan"], ("train.epochs",)),
    "epochs without end": Case(["train.max_steps=null", "train.epochs=1e308"], ("train.epochs",)),
    "no batch": Case(["train.global_batch_size=0"], ("train.global_batch_size=0",)),
    "batches that do not divide": Case(["train.global_batch_size=3", "train.micro_batch_size=2"]),
    "no sequence": Case(["train.max_seq_len=0"], ("train.max_seq_len=0",)),
    "sequence beyond the rotary positions": Case(["train.max_seq_len=128"]),
    "lr negative": Case(["optim.lr=-1"], ("optim.lr=-1",)),
    "lr NaN": Case(["optim.lr=nan"], ("optim.lr=nan",)),
    "no tokens to evaluate": Case(["eval.tokens=0"], ("eval.tokens=0",)),
    "tracker unknown": Case(["track.backends=[mlflow]"], ("track.backends", "mlflow")),
    "name with a folder": Case(["run.name=../outside"], ("run.name=../outside",)),
    "name of 300 letters": Case(["run.name=" + "x" * 300], ("run.name=", "200")),
    "name with a line break": Case(["run.name='a\nb'"], ("run.name",)),
    "unknown key": Case(["quant.nbit=3"], ("quant.nbit", "quant.nbits")),
    "unknown group": Case(["quantize.nbits=3"], ("quantize",)),
    "key of another tool": Case(["learning_rate=1e-4"], ("learning_rate", "optim.lr")),
    "several renamed keys": Case(
        ["train.checkpointing=true", "quant.storage=uint8"],
        ("train.activation_checkpointing", "quant.storage_dtype"),
    ),
    "a key without a name": Case(["=5"], ("=5",)),
    "a key without a value": Case(["quant.nbits"], ("quant.nbits",)),
    "unbalanced brackets": Case(["quant.skip=[lm_head"], ("quant.skip=[lm_head",)),
    "interpolation of nothing": Case(["run.name=${oc.env:NO_SUCH}"], ("NO_SUCH",)),
    "recipe elsewhere": Case(["recipe=../../../etc/passwd"], ("recipe",)),
    "recipe that is missing": Case(["recipe=tiny_2bits"], ("tiny_2bits", "tiny_2bit")),
    "recipe that is no YAML": Case(_recipe("quant: [1, 2"), ("mine.yaml",)),
    "recipe of bytes": Case(_recipe(bytes(range(256))), ("mine.yaml",)),
    "recipe that is a list": Case(_recipe("- quant\n- model\n"), ("mine.yaml",)),
    "recipe with a Python object": Case(
        _recipe("run: !!python/object/apply:os.system ['true']\n"), ("mine.yaml",)
    ),
    "recipe of aliases": Case(_recipe(BOMB), ("mine.yaml",)),
    "recipe without end": Case(_recipe("[" * 50_000), ("mine.yaml",)),
    "recipe with an unknown key": Case(_recipe("quant:\n  nbit: 3\n"), ("nbit",)),
}
