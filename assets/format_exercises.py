"""Exercises that turn a line into a fixed form: lists, JSON, fields and commands."""

from __future__ import annotations

import json
from random import Random

from assets.exercise import Exercise
from assets.words import (
    CATEGORIES,
    COLOURS,
    NAMES,
    PLACES,
    TOWNS,
    any_noun,
    any_word,
    article,
    made_up_word,
    number_in_words,
)


def list_items(rng: Random) -> Exercise:
    things = rng.sample([word for group in CATEGORIES.values() for word in group], rng.randint(2, 5))
    text = (
        f"{rng.choice(NAMES)} packed " + ", ".join(map(article, things[:-1])) + f" and {article(things[-1])}."
    )
    joiner, name = rng.choice((("; ", "semicolons"), (", ", "commas"), (" | ", "bars")))
    do = rng.choice(("List the things, parted by {}.", "Write what was packed, with {} between."))
    return Exercise(do.format(name), "Sentence", text, "List", joiner.join(things))


def person_as_json(rng: Random) -> Exercise:
    facts: dict[str, str | int] = {
        "name": rng.choice(NAMES),
        "age": rng.randint(5, 90),
        "job": rng.choice(CATEGORIES["job"]),
        "town": rng.choice(TOWNS),
    }
    spoken = rng.choice((str(facts["age"]), number_in_words(int(facts["age"]))))
    pattern = rng.choice(
        (
            "{name} is {age} years old and works as a {job} in {town}.",
            "The {job} {name}, aged {age}, comes from {town}.",
            "In {town} lives {name}, a {job}, who is now {age}.",
        )
    )
    keys = rng.sample(tuple(facts), rng.randint(1, 4))
    text = pattern.format(**{**facts, "age": spoken})
    do = rng.choice(("Write {} as JSON.", "Give a JSON object with {}.", "Extract {} in JSON."))
    return Exercise(
        do.format(" and ".join(keys)), "Text", text, "JSON", json.dumps({key: facts[key] for key in keys})
    )


def record_as_json(rng: Random) -> Exercise:
    keys = [made_up_word(rng) for _ in range(rng.randint(1, 3))]
    values = [rng.choice((any_word(rng), rng.randint(0, 99))) for _ in keys]
    text = rng.choice((", ", "; ", " and ")).join(
        f"{key} is {value}" for key, value in zip(keys, values, strict=True)
    )
    answer = json.dumps(dict(zip(keys, values, strict=True)))
    return Exercise("Turn the facts into a JSON object.", "Facts", text, "JSON", answer)


def thing_as_fields(rng: Random) -> Exercise:
    colour, thing, weight = rng.choice(COLOURS), any_noun(rng), rng.randint(2, 80)
    text = rng.choice(("A {c} {t} weighing {w} pounds.", "The {t} was {c} and weighed {w} pounds."))
    do, answer = rng.choice(
        (
            (
                "Write thing, colour and weight as key=value.",
                f"thing={thing} colour={colour} weight={weight}",
            ),
            ("Describe it as thing/colour/weight.", f"{thing}/{colour}/{weight}"),
            ("Write it as thing(colour, weight).", f"{thing}({colour}, {weight})"),
        )
    )
    return Exercise(do, "Text", text.format(c=colour, t=thing, w=weight), "Fields", answer)


def robot(rng: Random) -> Exercise:
    spoken, codes = [], []
    for _ in range(rng.randint(1, 3)):
        number = rng.randint(1, 12)
        said, code = rng.choice(
            (
                (f"go forward {number_in_words(number)} steps", f"fwd {number}"),
                (f"go back {number} steps", f"rev {number}"),
                ("turn to the left", "rot L"),
                ("turn to the right", "rot R"),
                (f"wait {number_in_words(number)} seconds", f"wait {number}"),
                (f"pick up the {(thing := any_word(rng))}", f"grab {thing}"),
            )
        )
        spoken.append(said)
        codes.append(code)
    text = rng.choice((", then ", " and then ", "; ")).join(spoken)
    return Exercise("Write the robot's program.", "Speech", text, "Program", "; ".join(codes))


def drawing(rng: Random) -> Exercise:
    shape, colour = rng.choice(("circle", "square", "star", "cross")), rng.choice(COLOURS)
    x, y = rng.randint(0, 30), rng.randint(0, 30)
    text = rng.choice(("draw {a} {s} at {x} and {y}", "I want {a} {s}, {x} across and {y} down"))
    text = text.format(a=article(colour), s=shape, x=x, y=y)
    return Exercise("Write the drawing command.", "Wish", text, "Command", f"{shape} {colour} at={x},{y}")


def file_command(rng: Random) -> Exercise:
    source, target = made_up_word(rng), made_up_word(rng)
    spoken, command = rng.choice(
        (
            (f"copy {source} to {target}", f"cp {source} {target}"),
            (f"rename {source} as {target}", f"mv {source} {target}"),
            (f"delete the file {source}", f"rm {source}"),
            (f"show me what is in {source}", f"cat {source}"),
            (f"make a folder called {source}", f"mkdir {source}"),
            (f"look for {source} in {target}", f"grep {source} {target}"),
        )
    )
    return Exercise("Write the shell command.", "Wish", spoken, "Command", command)


def boat(rng: Random) -> Exercise:
    heading, speed, sail = (
        rng.choice(("north", "south", "east", "west")),
        rng.randint(2, 40),
        rng.choice(PLACES),
    )
    text = rng.choice(
        (
            "sail {h} at {s} knots towards the {p}",
            "towards the {p}, heading {h}, speed {s}",
            "{h} it is, {s} knots, make for the {p}",
        )
    ).format(h=heading, s=speed, p=sail)
    return Exercise(
        "Write the captain's log line.", "Speech", text, "Log", f"goal:{sail} head:{heading} knots:{speed}"
    )
