"""The kinds of small tasks that the instruction generator draws from, with their weights.

Each kind is a function of a random generator that returns one `Exercise`. None of them is a demo task
(`assets.demo_tasks`): other instructions, labels, keys, commands and things.
"""

from __future__ import annotations

from assets import format_exercises, reading_exercises, text_exercises
from assets.exercise import Kind

KINDS: tuple[tuple[Kind, float], ...] = (
    (text_exercises.repeat, 2.0),
    (text_exercises.reverse_words, 1.0),
    (text_exercises.pick_word, 1.5),
    (text_exercises.count_words, 0.7),
    (text_exercises.spell, 1.0),
    (text_exercises.change_case, 1.0),
    (text_exercises.number_to_digits, 1.0),
    (text_exercises.number_to_words, 0.7),
    (reading_exercises.number_in_sentence, 1.5),
    (text_exercises.add, 1.0),
    (text_exercises.compare, 0.7),
    (text_exercises.sort_line, 0.7),
    (reading_exercises.category, 1.5),
    (reading_exercises.odd_one_out, 0.7),
    (reading_exercises.feeling, 1.0),
    (reading_exercises.weather, 0.7),
    (reading_exercises.opinion, 1.5),
    (reading_exercises.mood_of_sentence, 1.0),
    (reading_exercises.ask_about, 3.0),
    (reading_exercises.yes_or_no, 1.0),
    (text_exercises.opposite, 0.5),
    (text_exercises.past_tense, 0.7),
    (text_exercises.plural, 0.5),
    (text_exercises.replace_word, 1.5),
    (format_exercises.list_items, 1.5),
    (format_exercises.person_as_json, 2.5),
    (format_exercises.record_as_json, 2.0),
    (format_exercises.thing_as_fields, 2.0),
    (format_exercises.robot, 2.0),
    (format_exercises.drawing, 1.0),
    (format_exercises.file_command, 1.0),
    (format_exercises.boat, 1.0),
    (text_exercises.decode, 1.0),
    (text_exercises.continue_pattern, 1.0),
)
