"""The demo's tasks that write: sums in words, polite requests, train notices. Each draws text and answer."""

from __future__ import annotations

from random import Random

SUM_THINGS = ("shells", "marbles", "candles")
OFFICE_THINGS = ("report", "contract", "brochure", "timetable")
CITIES = ("Oslo", "Bergen", "Porto", "Lyon", "Vienna", "Gdansk", "Turin", "Bilbao")

_COUNTED = ("one", "two", "three", "four")
_SUM_NAMES = ("Lola", "Nils", "Pia", "Arno", "Suki", "Bram")
_MORE = (
    "{who} had {a} {x} and found {b} more.",
    "{who} owns {a} {x}; a friend adds {b}.",
    "There were {a} {x}, then {who} brought {b} others.",
    "{who} collects {a} {x} today and {b} tomorrow.",
)
_FEWER = (
    "{who} had {a} {x} and gave away {b}.",
    "Of {a} {x}, {who} used {b}.",
    "There were {a} {x} until {who} threw out {b}.",
    "{who} owns {a} {x} but mislays {b}.",
)

_DEEDS = ("send", "sign", "check", "translate")
_TIMES = ("today", "by Friday", "before lunch")
_CALLS = ("", "Hey, ", "Listen, ", "Right, ")
_BLUNT = (
    "{deed} the {thing} {time}!",
    "{deed} the {thing}, and do it {time}.",
    "I need you to {deed} the {thing} {time}.",
    "go {deed} the {thing} {time}, no excuses",
    "why don't you {deed} the {thing} {time}?",
    "the {thing}. {deed} it. {time}.",
    "{time} you {deed} the {thing}, got it?",
    "you must {deed} the {thing} {time}",
)

_HOURS = ("six", "seven", "eight", "nine", "noon", "midnight")
_PLATFORMS = ("one", "two", "three", "four", "five")
_KINDS = ("night", "express", "local")


def sum_story(rng: Random) -> tuple[str, str]:
    """Returns a little story with two numbers in words, and what is left or there in digits."""
    first, second = rng.randrange(len(_COUNTED)) + 1, rng.randrange(len(_COUNTED)) + 1
    thing = rng.choice(SUM_THINGS)
    pattern, result = rng.choice(_MORE), first + second
    if first > second and rng.random() < 0.6:
        pattern, result = rng.choice(_FEWER), first - second
    slots = {"who": rng.choice(_SUM_NAMES), "a": _COUNTED[first - 1], "b": _COUNTED[second - 1], "x": thing}
    return pattern.format(**slots), f"{result} {thing}"


def polite_request(rng: Random) -> tuple[str, str]:
    """Returns a blunt order and the same as a polite request."""
    slots = {"deed": rng.choice(_DEEDS), "thing": rng.choice(OFFICE_THINGS), "time": rng.choice(_TIMES)}
    text = rng.choice(_CALLS) + rng.choice(_BLUNT).format(**slots)
    return text[0].upper() + text[1:], "Could you please {deed} the {thing} {time}?".format(**slots)


def train_notice(rng: Random) -> tuple[str, str]:
    """Returns a record of a train and the sentence that announces it."""
    start, goal = rng.sample(CITIES, 2)
    record = {"from": start, "to": goal, "hour": rng.choice(_HOURS), "platform": rng.choice(_PLATFORMS)}
    kind = rng.choice(_KINDS)
    fields = [f"{name}[{value}]" for name, value in {**record, "kind": kind}.items()]
    rng.shuffle(fields)
    sentence = "The {kind} train from {from} to {to} leaves at {hour} from platform {platform}."
    return " ".join(fields), sentence.format(kind=kind, **record)
