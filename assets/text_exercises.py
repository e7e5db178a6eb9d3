"""Exercises on words, numbers and the wording of a line."""

from __future__ import annotations

from random import Random

from assets.exercise import Exercise, sentence, words_line
from assets.words import (
    CATEGORIES,
    IRREGULAR_PAST,
    NAMES,
    OPPOSITES,
    PLACES,
    any_noun,
    any_word,
    made_up_word,
    number_in_words,
)


def repeat(rng: Random) -> Exercise:
    text = " ".join(words_line(rng, 2, 9)) if rng.random() < 0.6 else sentence(rng)[0]
    do = rng.choice(
        ("Repeat the text exactly.", "Copy the line.", "Write the same words again.", "Say it once more.")
    )
    return Exercise(do, "Text", text, "Copy", text)


def reverse_words(rng: Random) -> Exercise:
    words = words_line(rng, 2, 6)
    do = rng.choice(
        ("Write the words in reverse order.", "Put the words backwards.", "Turn the list of words around.")
    )
    return Exercise(do, "Words", " ".join(words), "Reversed", " ".join(reversed(words)))


def pick_word(rng: Random) -> Exercise:
    words = words_line(rng, 3, 7)
    which, index = rng.choice((("first", 0), ("last", -1), ("second", 1), ("third", 2)))
    do = rng.choice(("What is the {} word?", "Write only the {} word.", "Give the {} word of the line."))
    return Exercise(do.format(which), "Line", " ".join(words), "Word", words[index])


def count_words(rng: Random) -> Exercise:
    words = words_line(rng, 1, 9)
    do = rng.choice(("How many words are in the line?", "Count the words."))
    return Exercise(do, "Line", " ".join(words), "Number", str(len(words)))


def spell(rng: Random) -> Exercise:
    word = any_word(rng)
    do = rng.choice(("Spell the word with hyphens.", "Write each letter, parted by hyphens."))
    return Exercise(do, "Word", word, "Letters", "-".join(word))


def change_case(rng: Random) -> Exercise:
    words = " ".join(words_line(rng, 1, 5))
    do, answer = rng.choice(
        (("Write it in capital letters.", words.upper()), ("Begin every word with a capital.", words.title()))
    )
    return Exercise(do, "Text", words, "Result", answer)


def number_to_digits(rng: Random) -> Exercise:
    number = rng.randint(0, 99)
    do = rng.choice(("Write the number in digits.", "Turn the words into a number.", "Which number is this?"))
    return Exercise(do, "Number", number_in_words(number), "Digits", str(number))


def number_to_words(rng: Random) -> Exercise:
    number = rng.randint(0, 99)
    return Exercise("Write the number in words.", "Number", str(number), "Words", number_in_words(number))


def add(rng: Random) -> Exercise:
    left, right = rng.randint(0, 20), rng.randint(0, 20)
    if rng.random() < 0.35 and left >= right:
        return Exercise("Subtract.", "Sum", f"{left} - {right}", "Result", str(left - right))
    form = rng.choice(("{} + {}", "{} plus {}", "the sum of {} and {}"))
    return Exercise("Work it out.", "Sum", form.format(left, right), "Result", str(left + right))


def compare(rng: Random) -> Exercise:
    left, right = rng.sample(range(100), 2)
    which, pick = rng.choice((("larger", max), ("smaller", min)))
    return Exercise(
        f"Which number is {which}?", "Numbers", f"{left} and {right}", "Answer", str(pick(left, right))
    )


def sort_line(rng: Random) -> Exercise:
    if rng.random() < 0.5:
        numbers = rng.sample(range(60), rng.randint(2, 5))
        text, answer = " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))
        return Exercise("Put the numbers in order, smallest first.", "Numbers", text, "Ordered", answer)
    words = rng.sample([word for group in CATEGORIES.values() for word in group], rng.randint(2, 4))
    return Exercise(
        "Sort the words by the alphabet.", "Words", ", ".join(words), "Sorted", ", ".join(sorted(words))
    )


def past_tense(rng: Random) -> Exercise:
    verb, past = rng.choice(tuple(IRREGULAR_PAST.items()))
    who, where = rng.choice(NAMES), rng.choice(PLACES)
    text, answer = f"{who} and I {verb} by the {where}.", f"{who} and I {past} by the {where}."
    return Exercise("Put the sentence into the past.", "Now", text, "Then", answer)


def plural(rng: Random) -> Exercise:
    noun, number = any_noun(rng), rng.randint(2, 9)
    ending = "es" if noun.endswith(("s", "x", "ch", "sh")) else "ies" if noun.endswith("ry") else "s"
    stem = noun[:-1] if ending == "ies" else noun
    return Exercise(
        "Make it many.", "One", f"one {noun}", "Many", f"{number_in_words(number)} {stem}{ending}"
    )


def opposite(rng: Random) -> Exercise:
    word, answer = rng.choice(tuple(OPPOSITES.items()))
    do = rng.choice(("Give the opposite.", "Which word means the contrary?"))
    return Exercise(do, "Word", word, "Opposite", answer)


def replace_word(rng: Random) -> Exercise:
    text, parts = sentence(rng)
    old = parts[rng.choice(("thing", "who", "place"))]
    new = any_word(rng)
    do = f'Replace "{old}" by "{new}".'
    return Exercise(do, "Text", text, "Result", text.replace(old, new))


def decode(rng: Random) -> Exercise:
    words = rng.sample([word for group in CATEGORIES.values() for word in group], rng.randint(2, 4))
    table = {word: made_up_word(rng) for word in words}
    asked = rng.choices(words, k=rng.randint(1, 3))
    text = ", ".join(f"{word} = {code}" for word, code in table.items()) + f". Now: {' '.join(asked)}"
    return Exercise("Use the code table.", "Table", text, "Coded", " ".join(table[word] for word in asked))


def continue_pattern(rng: Random) -> Exercise:
    unit = words_line(rng, 2, 3)
    shown = (unit * 5)[: rng.randint(2 * len(unit), 3 * len(unit) + 1)]
    following = (unit * 6)[len(shown)]
    return Exercise("Which word comes next?", "Row", " ".join(shown), "Next", following)
