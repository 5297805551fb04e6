"""A card that was edited is told from one that hqqtrain has written."""

from hqqtrain.formats.signed_card import is_signed_card, signed_card


def test_an_edited_card_is_recognized():
    card = signed_card("# A model\n")
    assert card.startswith("# A model\n<!-- ")
    assert is_signed_card(card)
    assert not is_signed_card(card.replace("A model", "My model"))
    assert not is_signed_card(f"{card}More.\n")
    assert not is_signed_card("# A model\n")
