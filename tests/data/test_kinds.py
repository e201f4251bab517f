"""Every list of the kinds of data is the registry's."""

import pytest

from niwaki import data
from niwaki.cli.options import DETECTORS, Data
from niwaki.errors import InputError, UnknownNameError


def test_every_kind_is_listed() -> None:
    listed = data.kinds()
    assert [one.partition(":")[0] for one in listed] == [*data.READERS, *data.BOX_READERS, data.TEXT]
    with pytest.raises(UnknownNameError) as caught:
        data.open("nope")
    assert caught.value.found == f"known: {', '.join(listed)}"
    (option,) = Data.__metadata__
    assert all(one in option.help for one in listed)  # typed there, since help imports no torch
    with pytest.raises(InputError, match="open_text"):
        data.open("text:book.txt")
    assert tuple(data.BOX_READERS) == DETECTORS
    with pytest.raises(InputError, match="open_boxes"):
        data.open("voc:folder")
