"""The locks in `requirements/` hold what pyproject.toml pins, with hashes, and no place to get it from."""

import re

import pytest

from requirements.lock import FOLDER, LOCKS, NOT_LOCKED, direct_pins

ENTRY = re.compile(
    r"([a-z0-9][a-z0-9._-]*==[^ ;\\]+)(?: ; [^\\]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)"
)


def entries(name: str) -> dict[str, int]:
    """The locked pins of a file, and how many hashes each has."""
    text = (FOLDER / f"{name}.txt").read_text("utf-8")
    found = [ENTRY.fullmatch(entry) for entry in re.split(r"\n(?=\S)", text.rstrip("\n"))]
    assert all(found), "something is no pin with hashes"
    return {entry[1]: entry[2].count("--hash") for entry in found if entry}


@pytest.mark.parametrize("name", LOCKS)
def test_every_direct_pin_is_locked(name: str) -> None:
    locked = entries(name)
    wanted = [pin for pin in direct_pins(LOCKS[name]) if not NOT_LOCKED.match(pin)]
    assert set(wanted) <= set(locked), "run `make lock`"
    assert len(locked) > len(wanted)
    names = [pin.partition("==")[0] for pin in locked]
    assert len(names) == len(set(names))


def test_which_build_of_torch_is_left_open() -> None:
    for name in LOCKS:
        assert not [pin for pin in entries(name) if NOT_LOCKED.match(pin)]


def test_the_light_lock_is_a_part_of_the_full_one() -> None:
    assert entries("light").items() <= entries("full").items()
