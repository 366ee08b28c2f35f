from __future__ import annotations

import pytest

from sparsek.engines.naming import naming


def test_an_error_without_a_name_gets_one() -> None:
    with pytest.raises(OSError, match="No space") as caught, naming("a.txt"):
        raise OSError(28, "No space left on device")
    assert (caught.value.errno, caught.value.filename) == (28, "a.txt")
    with pytest.raises(BrokenPipeError), naming("standard output"):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_name_that_it_has_stays() -> None:
    with pytest.raises(FileNotFoundError, match="'/no/such'"), naming("a.txt"), open("/no/such"):
        pass
