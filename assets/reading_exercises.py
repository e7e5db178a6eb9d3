"""Exercises that read a line: labels, questions, yes or no."""

from __future__ import annotations

from random import Random

from assets.exercise import Exercise, sentence
from assets.words import (
    BLAME,
    CATEGORIES,
    COLOURS,
    FEELINGS,
    NAMES,
    PLACES,
    PRAISE,
    WEATHER,
    WORKS,
    any_noun,
    number_in_words,
)


def number_in_sentence(rng: Random) -> Exercise:
    number, noun = rng.randint(2, 60), any_noun(rng)
    spoken = number_in_words(number) if rng.random() < 0.6 else str(number)
    text = rng.choice(
        ("{who} has {n} {x}s.", "There were {n} {x}s at the {p}.", "We counted {n} {x}s, said {who}.")
    )
    text = text.format(who=rng.choice(NAMES), n=spoken, x=noun, p=rng.choice(PLACES))
    do = rng.choice(
        (f"How many {noun}s are there? Use digits.", "Which number is in the sentence? Use digits.")
    )
    return Exercise(do, "Sentence", text, "Number", str(number))


def category(rng: Random) -> Exercise:
    labels = rng.sample(tuple(CATEGORIES), rng.randint(2, 5))
    label = rng.choice(labels)
    do = rng.choice(("Which group does the word belong to: {}?", "Choose one label: {}.", "Is it one of {}?"))
    return Exercise(do.format(", ".join(labels)), "Word", rng.choice(CATEGORIES[label]), "Group", label)


def odd_one_out(rng: Random) -> Exercise:
    common, odd = rng.sample(tuple(CATEGORIES), 2)
    stranger = rng.choice(CATEGORIES[odd])
    words = [*rng.sample(CATEGORIES[common], 3), stranger]
    rng.shuffle(words)
    return Exercise(
        "Which word does not fit with the others?", "Words", ", ".join(words), "Odd one", stranger
    )


def feeling(rng: Random) -> Exercise:
    label = rng.choice(tuple(FEELINGS))
    do = rng.choice(("Name the feeling: joy, anger, fear or sorrow.", "What does the speaker feel?"))
    return Exercise(
        do, "Speech", f"{rng.choice(FEELINGS[label])}, said {rng.choice(NAMES)}.", "Feeling", label
    )


def weather(rng: Random) -> Exercise:
    label = rng.choice(tuple(WEATHER))
    do = rng.choice(("What is the weather: rain, snow, wind or sun?", "Label the weather of this note."))
    return Exercise(do, "Note", f"{rng.choice(WEATHER[label])}.", "Weather", label)


def opinion(rng: Random) -> Exercise:
    good = rng.random() < 0.5
    words, work = rng.sample(PRAISE if good else BLAME, 2), rng.choice(WORKS)
    text = rng.choice(
        ("I found the {w} {a} and {b}.", "A {a}, {b} {w}.", "What {a} writing, so {b}, this {w}!")
    )
    labels = rng.choice(
        (("good", "bad"), ("like", "dislike"), ("plus", "minus"), ("thumbs up", "thumbs down"))
    )
    do = f"Does the critic approve? Answer {labels[0]} or {labels[1]}."
    return Exercise(do, "Review", text.format(a=words[0], b=words[1], w=work), "Verdict", labels[not good])


def mood_of_sentence(rng: Random) -> Exercise:
    text, parts = sentence(rng)
    label = rng.choice(("question", "statement", "order"))
    if label == "question":
        text = rng.choice((f"Where is the {parts['thing']}?", f"Who {parts['verb']} the {parts['thing']}?"))
    elif label == "order":
        text = rng.choice((f"Bring me the {parts['thing']}!", f"Go to the {parts['place']} at once."))
    return Exercise("Is it a question, a statement or an order?", "Sentence", text, "Kind", label)


def ask_about(rng: Random) -> Exercise:
    text, parts = sentence(rng)
    questions = {
        "who": f"Who {parts['verb']} the {parts['thing']}?",
        "thing": f"What was it that {parts['who']} {parts['verb']}?",
        "place": "Where was it?",
        "colour": f"What was the {parts['thing']} like?",
    }
    about = rng.choice(tuple(questions))
    return Exercise(questions[about], rng.choice(("Story", "Text", "Passage")), text, "Answer", parts[about])


def yes_or_no(rng: Random) -> Exercise:
    text, parts = sentence(rng)
    true = rng.random() < 0.5
    about = rng.choice(("who", "thing", "colour"))
    other = {"who": rng.choice(NAMES), "thing": any_noun(rng), "colour": rng.choice(COLOURS)}[about]
    word = parts[about] if true else other
    answer = "yes" if word == parts[about] else "no"
    return Exercise(
        f'Does the text contain the word "{word}"? Answer yes or no.', "Text", text, "Answer", answer
    )
