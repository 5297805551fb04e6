"""Failures of the Hub are messages that say what to do."""

import pytest
from huggingface_hub.errors import HTTPError

from hqqtrain.common.errors import PreemptedError, RankLostError, UserError
from hqqtrain.hub.errors import hub_errors


def test_the_cause_of_a_wrapped_error_is_told():
    def fail() -> None:
        try:
            raise HTTPError("connection reset")
        except HTTPError as error:
            raise RuntimeError("Error while uploading 'x'") from error

    with (
        pytest.raises(UserError, match=r"^where: the connection to .*: connection reset\)\. Again"),
        hub_errors("where", "Again."),
    ):
        fail()
    with pytest.raises(UserError, match=r"failed \(ValueError: bad\)\.$"), hub_errors("where"):
        raise ValueError("bad")
    with pytest.raises(UserError, match=r"answer of the Hub cannot be read"), hub_errors("where"):
        [][0]


@pytest.mark.parametrize(
    "error", [UserError("mine"), PreemptedError("mine"), RankLostError("mine")]
)
def test_other_errors_pass(error):
    with pytest.raises(type(error), match="mine"), hub_errors("where"):
        raise error
